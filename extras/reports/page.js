// The second part of the script of report.html: the questions and the wordings. After table.js.

// ----- One question -----
// For each word of the text whether it is missing in the longest common subsequence of both texts.
function differingWords(words, reference) {
  const [n, m] = [words.length, reference.length];
  if (n * m > 1e6) return words.map((word) => !reference.includes(word));  // too long to align
  // common[i][j]: length of the longest common subsequence of words[i:] and reference[j:].
  const common = Array.from({length: n + 1}, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i -= 1) {
    for (let j = m - 1; j >= 0; j -= 1) {
      const without = Math.max(common[i + 1][j], common[i][j + 1]);
      common[i][j] = words[i] === reference[j] ? common[i + 1][j + 1] + 1 : without;
    }
  }
  const differs = new Array(n).fill(true);
  for (let i = 0, j = 0; i < n && j < m;) {
    if (words[i] === reference[j]) {
      differs[i] = false;
      i += 1;
      j += 1;
    } else if (common[i + 1][j] >= common[i][j + 1]) {
      i += 1;
    } else {
      j += 1;
    }
  }
  return differs;
}

function markedResponse(response, reference) {
  const place = make("span", [], "response");
  place.dir = "auto";
  const differs = differingWords(splitWords(response), splitWords(reference));
  let number = 0;
  for (const part of response.split(/(\s+)/)) {  // words and the spaces between them
    if (part.trim() && differs[number++]) {
      place.append(make("mark", part));
    } else {
      place.append(part);
    }
  }
  if (!response.trim()) place.append(make("em", "(empty)"));
  return place;
}

const splitWords = (text) => text.split(/\s+/).filter(Boolean);

function responseCell(row, i) {
  const cluster = row.cluster[i];
  const size = countValues(row.cluster).get(cluster);
  const colour = size > 1 ? `cluster c${cluster % 8}` : "cluster alone";
  const badge = make("span", letters(cluster), `badge ${colour}`);
  badge.title = `cluster ${letters(cluster)}: ${size} of ${row.cluster.length} responses`;
  const cell = make("td", badge, colour);
  if (row.correct[i] !== null) {
    const mark = make("span", row.correct[i] ? "✓" : "✗", "mark");
    mark.title = row.correct[i] ? "exact match" : "no exact match";
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", mark.title);
    cell.append(" ", mark);
  }
  const reference = row.responses[row.cluster.indexOf(0)];
  cell.append(" ", markedResponse(textOf(row.responses[i]), textOf(reference)));
  return cell;
}

// Lines of an opened question: a wording and its number among equal ones, and the place of the
// response in each model's row.
function alignWordings(question) {
  const lines = new Map();
  question.models.forEach((row, model) => {
    const seen = new Map();
    if (!row) return;
    data.lists[row.wordings].forEach((wording, i) => {
      const sample = (seen.get(wording) ?? 0) + 1;
      seen.set(wording, sample);
      const key = `${wording} ${sample}`;
      const style = data.lists[row.styles][i];
      if (!lines.has(key)) lines.set(key, {wording, sample, style, places: new Map()});
      lines.get(key).places.set(model, i);
    });
  });
  return [...lines.values()];
}

function openQuestion(question) {
  const references = textsOf(question.targets);
  const id = textOf(question.id) && `, ${textOf(question.id)}`;
  const facts = make("dl", [
    make("dt", "Task"), make("dd", textOf(question.task) + id),
    make("dt", "Input"), make("dd", textOf(question.input), "outside"),
    make("dt", "Reference"), make("dd", references.join(" / ") || "none", "outside")]);
  const heads = ["wording", ...data.names].map((name) => make("th", name));
  const body = make("tbody");
  for (const {wording, sample, style, places} of alignWordings(question)) {
    const head = make("th", textOf(wording), "outside");
    head.scope = "row";
    if (sample > 1) head.append(" ", make("small", `sample ${sample}`));
    if (style !== undefined) head.append(" ", make("small", textOf(style), "style"));
    const line = make("tr", head);
    question.models.forEach((row, model) => {
      const i = places.get(model);
      line.append(i === undefined ? make("td", "-") : responseCell(row, i));
    });
    body.append(line);
  }
  const table = make("table", [make("thead", make("tr", heads)), body], "responses");
  return [facts, make("div", table, "wide")];
}

// ----- All questions -----
const input = (name) => document.getElementById(name);
const hasReferences = data.questions.some((question) => data.lists[question.targets].length);

const rowsOf = (question) => question.models.filter(Boolean);
const hasPairs = data.questions.some((question) => (
  rowsOf(question).some((row) => row.responses.length > 1)));

function countRight(row) {
  const known = row.correct.filter((right) => right !== null);
  return [known.filter(Boolean).length, known.length];
}

function questionColumns() {
  const columns = [
    {title: "Input", value: (x) => textOf(x.input), cell: (x) => textOf(x.input).slice(0, 300),
     className: "outside input"},
    {title: "Task", value: (x) => textOf(x.task), cell: (x) => textOf(x.task),
     className: "outside task"}];
  data.names.forEach((group, model) => {
    for (const [title, name] of hasPairs ? [["CR", "cr"], ["MCR", "mcr"]] : []) {
      const value = (x) => x.models[model]?.[name] ?? null;
      columns.push({title, group, value, cell: (x) => percent(value(x)), className: "number"});
    }
    const right = (x) => x.models[model] ? countRight(x.models[model]) : [0, 0];
    const value = (x) => right(x)[1] ? right(x)[0] / right(x)[1] : null;
    const cell = (x) => right(x)[1] ? right(x).join(" of ") : "-";
    if (hasReferences) columns.push({title: "Right", group, value, cell, className: "number"});
  });
  return columns;
}

// Whether some response is outside the one largest cluster; with a style, some response of it.
function isBroken(row, style) {
  const sizes = countValues(row.cluster);
  const most = Math.max(...sizes.values());
  const largest = [...sizes.keys()].filter((number) => sizes.get(number) === most);
  const styles = data.lists[row.styles];
  return row.cluster.some((number, i) => {
    const asked = style === "" || styles[i] === Number(style);
    return asked && (largest.length > 1 || number !== largest[0]);
  });
}

function hasAgreement(row, wanted, style) {
  return wanted === "" || isBroken(row, style) === (wanted === "broken");
}

function isRight(row, wanted) {
  const [right, known] = countRight(row);
  if (wanted === "") return true;
  if (!known) return false;
  if (wanted === "all") return right === known;
  return wanted === "none" ? right === 0 : right > 0 && right < known;
}

// Places of the texts that hold the searched one.
function searchTexts(searched) {
  const found = new Set();
  data.strings.forEach((text, place) => {
    if (text.toLowerCase().includes(searched)) found.add(place);
  });
  return found;
}

function isFound(question, found) {
  const own = [question.input, question.task, question.id, ...data.lists[question.targets]];
  if (own.some((place) => found.has(place))) return true;
  return rowsOf(question).some((row) => (
    row.responses.some((place) => found.has(place))
    || data.lists[row.wordings].some((place) => found.has(place))));
}

function filterQuestions() {
  const names = ["task", "style", "agreement", "correct", "model"];
  const [task, style, agreement, correct, model] = names.map((name) => input(name).value);
  const searched = input("search").value.trim().toLowerCase();
  const found = searched && searchTexts(searched);
  return data.questions.filter((question) => {
    if (task !== "" && question.task !== Number(task)) return false;
    if (searched && !isFound(question, found)) return false;
    const rows = question.models.filter((row, number) => (
      row && (model === "" || number === Number(model))));
    return rows.some((row) => isRight(row, correct) && hasAgreement(row, agreement, style)
                              && (style === "" || data.lists[row.styles].includes(Number(style))));
  });
}

function addOptions(select, entries) {
  for (const [value, text] of entries) {
    const option = make("option", text);
    option.value = value;
    select.append(option);
  }
}

function byText(places) {
  const entries = [...new Set(places)].map((place) => [place, textOf(place)]);
  return entries.sort(([, a], [, b]) => (a < b ? -1 : 1));
}

function showQuestions() {
  const table = new SortableTable(input("table"), questionColumns(), openQuestion);
  const styles = new Set();
  for (const question of data.questions) {
    for (const row of rowsOf(question)) styles.add(row.styles);
  }
  addOptions(input("task"), byText(data.questions.map((question) => question.task)));
  addOptions(input("style"), byText([...styles].flatMap((list) => data.lists[list])));
  addOptions(input("model"), data.names.map((name, number) => [number, name]));
  input("style").parentElement.hidden = input("style").length < 3;
  input("correct").parentElement.hidden = !hasReferences;
  input("agreement").parentElement.hidden = !hasPairs;
  input("model").parentElement.hidden = data.names.length < 2;
  const form = input("filters");
  form.hidden = false;
  input("help").hidden = !hasPairs;
  form.addEventListener("input", () => table.show(filterQuestions()));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => table.show(filterQuestions())));
  table.show(filterQuestions());
}

// ----- All wordings -----
function showWordings() {
  const place = document.querySelector("#wordings-that-break-agreement .wide");
  if (!place) return;
  const columns = [
    {title: "Wording", value: (x) => textOf(x.wording), cell: (x) => textOf(x.wording),
     className: "outside"},
    {title: "Task", value: (x) => textOf(x.task), cell: (x) => textOf(x.task),
     className: "outside task"},
    {title: "Style", value: (x) => textOf(x.style), cell: (x) => textOf(x.style)}];
  data.names.forEach((name, model) => {
    const cell = (x) => {
      if (!x.shares[model]) return "-";
      const [share, n] = x.shares[model];
      return [percent(share), " ", make("small", `(n = ${n})`)];
    };
    columns.push({title: name, value: (x) => x.shares[model]?.[0] ?? null, cell,
                  className: "number", descending: true});
  });
  const all = make("div");
  place.replaceWith(all);
  new SortableTable(all, columns).show(data.ranking);
}

showWordings();
showQuestions();
