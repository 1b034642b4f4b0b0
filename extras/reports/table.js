// The first part of the script of report.html: small helpers, and a table that sorts.
// Texts from outside are only ever set as textContent, never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50;  // rows of a table that are in the document at a time

const textOf = (place) => data.strings[place];
const textsOf = (place) => data.lists[place].map(textOf);

// ----- Small helpers -----
function make(tag, content = [], className = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...[content].flat());  // strings become text nodes
  return element;
}

function makeButton(content, action, className) {
  const button = make("button", content, className);
  button.type = "button";
  button.addEventListener("click", action);
  return button;
}

function percent(share) {
  return share === null ? "-" : (100 * share).toFixed(1);
}

function letters(number) {  // A, B, ..., Z, AA, as agreement.letters
  let name = "";
  for (let rest = number; rest >= 0; rest = Math.floor(rest / 26) - 1) {
    name = String.fromCharCode(65 + rest % 26) + name;
  }
  return name;
}

function countValues(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return counts;
}

// ----- A table that sorts and turns pages -----
// columns: {title, group, value(row) to sort by, cell(row) to show, descending: the first order}
// open(row): what a click on the first column shows below the row.
class SortableTable {
  constructor(place, columns, open) {
    Object.assign(this, {columns, open, rows: [], page: 0, sorted: null, descending: false});
    this.opened = new Set();
    this.status = make("span", [], "status");
    this.status.setAttribute("role", "status");
    this.previous = makeButton("Previous", () => this.turn(-1));
    this.next = makeButton("Next", () => this.turn(1));
    this.body = make("tbody");
    this.heads = columns.map((column, number) => this.makeHead(column, number));
    const head = make("thead", [this.makeGroups(), make("tr", this.heads)].flat());
    const wide = make("div", make("table", [head, this.body]), "wide");
    const pager = make("nav", [this.previous, this.next, this.status], "pager");
    place.replaceChildren(pager, wide);
  }

  makeGroups() {  // a row of headings above those of the columns
    const row = make("tr");
    for (const {group = ""} of this.columns) {
      if (row.lastChild && row.lastChild.textContent === group) {
        row.lastChild.colSpan += 1;
      } else {
        row.append(make(group ? "th" : "td", group));
        if (group) row.lastChild.scope = "colgroup";
      }
    }
    return this.columns.some((column) => column.group) ? [row] : [];
  }

  makeHead(column, number) {
    const head = make("th", makeButton(column.title, () => this.sort(number)));
    head.scope = "col";
    return head;
  }

  sort(number) {
    const first = this.columns[number].descending ?? false;
    this.descending = this.sorted === number ? !this.descending : first;
    this.sorted = number;
    this.show(this.rows);
  }

  show(rows) {  // rows in their own order; those without a value come last
    this.rows = rows;
    this.ordered = rows;
    if (this.sorted !== null) {
      const {value} = this.columns[this.sorted];
      const keyed = rows.map((row) => [value(row), row]);
      const known = keyed.filter(([key]) => key !== null);
      const sign = this.descending ? -1 : 1;
      known.sort(([a], [b]) => sign * (a < b ? -1 : Number(a > b)));
      const unknown = keyed.filter(([key]) => key === null);
      this.ordered = known.concat(unknown).map(([, row]) => row);
    }
    this.page = 0;
    this.draw();
  }

  turn(step) {
    this.page += step;
    this.draw();
  }

  draw() {
    const count = this.ordered.length;
    const start = this.page * PAGE;
    const end = Math.min(start + PAGE, count);
    this.previous.disabled = start === 0;
    this.next.disabled = end === count;
    this.status.textContent = count ? `${start + 1} to ${end} of ${count}` : "none";
    this.heads.forEach((head, number) => {
      const order = this.descending ? "descending" : "ascending";
      head.setAttribute("aria-sort", number === this.sorted ? order : "none");
    });
    this.body.replaceChildren();
    for (const row of this.ordered.slice(start, end)) this.drawRow(row);
  }

  drawRow(row) {
    const cells = this.columns.map((column) => make("td", column.cell(row), column.className));
    const line = make("tr", cells);
    this.body.append(line);
    if (!this.open) return;
    const button = makeButton([...cells[0].childNodes], () => this.toggle(row, line), "open");
    cells[0].replaceChildren(button);
    line.addEventListener("click", (event) => {
      if (!event.target.closest("button")) this.toggle(row, line);
    });
    button.setAttribute("aria-expanded", "false");
    if (this.opened.delete(row)) this.toggle(row, line);
  }

  toggle(row, line) {
    const button = line.querySelector("button");
    if (this.opened.delete(row)) {
      line.nextSibling.remove();
    } else {
      this.opened.add(row);
      const cell = make("td", this.open(row));
      cell.colSpan = this.columns.length;
      line.after(make("tr", cell, "opened"));
    }
    button.setAttribute("aria-expanded", String(this.opened.has(row)));
  }
}
