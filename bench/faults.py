"""What was tried to break it, how often, and what came of it: the table of docs/faults.md.

    python bench/faults.py                     # about 25 minutes on two cores
    python bench/faults.py --quick             # the trials that run with the test suite
    python bench/faults.py --rows redirects    # only the rows with this word

Each row is a fault or an attack; the named tests make it as often as the row says. The failure rate
is the bound that this many trials exclude with 95 % confidence. A row's control is the same trial
against a version without the protection: it must fail, otherwise the row would show nothing. The
exit status is pytest's: 1 if a trial failed or a control did not. After Ctrl-C, the table has what
ran until then.

Every row must have tests, and every test with the marker `faults` must be in a row.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADER = ("| fault or attack | trials | failed | failure rate below (95 %) "
          "| control, which must fail | seconds |\n|---|---|---|---|---|---|")
# parameters that say how many trials a test makes
COUNTS = {"trials", "times", "pairs", "steps", "most"}  # a number, or one for each of a tuple

# (what, its tests, their control, what that lacks). Tests: FILE::PATTERN of tests/**/test_FILE.py,
# with N* in front where each of them makes N trials and does not say so; the parameters of a test
# stand behind a dot. What two rows name counts in the first of them.
ROWS = [
    # Runs and checkpoints
    ("kill -9 while checkpoints are written", "write::test_kills_while_saving.*ours",
     "write::test_kills_while_saving.*in place", "files written in place"),
    ("kill -9 of whole runs, 3 times each: the same bytes in the end",
     "3*resume::test_a_run_killed_at_random_moments",
     "resume::test_whatever_a_checkpoint_leaves_out", "a checkpoint that lacks a part"),
    ("runs stopped at each of several steps and resumed: the same bytes",
     "resume::test_a_run_stopped_at_each_step",
     "resume::test_whatever_a_checkpoint_leaves_out", "a checkpoint that lacks a part"),
    ("a damaged checkpoint",
     "resume::test_a_damaged_checkpoint resume::test_no_complete_checkpoint"),
    ("the n-th system call of a save fails: no space, a bad disk, no permission, Ctrl-C",
     "write::test_a_save_that_fails"),
    ("order of writes, file modes, run folders that are links or not writable",
     "write::test_files_are_synced write::test_what_tells_that write::test_a_run_folder_may "
     "write::test_a_place_that hf_weights::test_modes"),
    ("changed settings, changed inputs or a lost log when a run is resumed",
     "resume::test_other_settings resume::test_settings_that 2*resume::test_changed_inputs"),
    ("a full disk", "write::test_a_full_disk answers::test_a_full_disk_is"),
    ("SIGTERM and Ctrl-C, during a step and at random moments",
     "stop::test_a_signal 10*stop::test_signals_at_random_moments"),
    ("two processes that start in one folder at the same time",
     "20*write::test_two_processes write::test_a_folder_in_use"),
    ("inputs, weights below and results of a run exchanged behind the same names",
     "identity::test_a_changed_file identity::test_any_change identity::test_an_adapter_over "
     "identity::test_a_damaged", "identity::test_without_identities", "no identity.json"),
    ("a log that is removed, replaced or written to by others in mid-run",
     "streams::test_a_log_that", "streams::test_without_the_watch", "a log that is not watched"),
    ("run.lock removed in mid-run, and a second process started",
     "streams::test_of_two_processes streams::test_a_removed_lock",
     "streams::test_without_the_look", "a lock that is looked at once"),
    ("SIGHUP, a clock set back, half-written files, streams that close, names that are no text",
     "streams::test_a_hangup streams::test_a_clock streams::test_what_a_kill "
     "streams::test_a_run_outlasts streams::test_what_is_no_text streams::test_other_programs"),
    ("flags that nobody reads", "every_flag::test_every_flag",
     "every_flag::test_a_flag_that", "a stage with such flags"),
    # Records
    ("kill -9 of a process that writes records", "2*own_records::test_kills_while.*ours",
     "own_records::test_kills_while.*unrepaired", "the torn last line is left in place"),
    ("kills while 240 answers are sampled: none is sampled again, the same bytes",
     "2*own_records::test_answers_collected_before"),
    ("duplicate and contradictory records", "300*own_records::test_duplicate_records"),
    ("a record file truncated at every byte",
     "answers::test_a_torn_last_line own_records::test_a_torn_last_line"),
    ("damage inside a record file: refused and left alone",
     "own_records::test_damage_that answers::test_damage_elsewhere data::test_damage"),
    ("hostile texts in records, on the screen and in reports",
     "300*pages::test_hostile_texts data::test_records_round_trip client::test_hostile_text "
     "eval::.*control_characters pages::test_the_report_neutralises"),
    # Numbers
    ("NaN, infinity and 3e38 in a loss or gradient, with 1, 2 and 3 processes",
     "bad_numbers::test_a_bad_number train::test_a_non_finite",
     "bad_numbers::test_clipping_alone", "gradient clipping alone"),
    ("losses that jump, and clean steps", "2020*bad_numbers::test_planted_spikes"),
    ("log(1 - p) at margins up to 200", "5*losses::test_complement_is_finite"),
    ("every loss on empty answers, and rows without a target",
     "empty_answers:: losses::test_an_all_ignored losses::test_cut_without_tokens "
     "sft::.*without_a_target shared::.*without_a_label"),
    ("losses and metrics at their limits",
     "losses::.*(extreme|at_the_start) advantages::.*(limits|whitening) pro::.*limits "
     "preference::.*extremes rso::.*limits reward::.*far_apart head::.*sure_model "
     "eval::.*(bootstrap_of_no|rouge_of_nothing|has_no_cr) meta::test_kappa "
     "more_metrics::.*whatever_is_missing"),
    ("samplers at their limits", "6*model::test_sample_at_its_edges model::test_sample_gives "
     "model::test_non_finite model::test_an_empty_prompt"),
    ("answers whose largest cluster is hard to find, and 1,100 equal ones: an end, and a bound",
     "cliques::test_graphs_that_defeat cliques::test_a_search_that_gives_up "
     "300*cliques::test_the_same_sets cliques::test_the_plain_search_goes",
     "cliques::test_the_plain_search_does_not_end",
     "the course's recursive search"),
    ("intervals over tasks, of one model and of a paired difference: coverage",
     "intervals::test_coverage"),
    ("intervals of values that are all equal", "200*eval::test_an_interval_of_equal_values"),
    ("top-p at the boundary", "model::test_top_p_ends_where"),
    ("an adapter loaded into a model in eval mode",
     "lora::test_an_adapter_takes_over_the_mode"),
    # Many processes
    ("records and metrics of 1, 2, 3 and 4 processes",
     "many::test_processes_share many::test_two_processes_of_torchrun"),
    ("shards over 2 and 3 processes: losses and weights as with one",
     "shards::test_shards_train shards::test_each_process hf_weights::test_each_process"),
    ("runs resumed with another number of processes", "many::test_a_run_of_two_processes"),
    ("a mistake under torchrun gives one error line",
     "many::test_a_mistake 2*many::test_what_one_process_alone many::test_where_the_first "
     "many::test_two_machines"),
    ("a server that fails rank 0; only rank 0 asks it", "many::test_a_server_"),
    # Judges behind a server
    ("judge calls that go wrong in 20 % of the tries", "1000*client::test_a_thousand_calls"),
    ("kill -9 during 600 paid calls: none is asked again",
     "20*client::test_twenty_kills client::test_a_kill_costs.*ours",
     "client::test_a_kill_costs.*recorded after use", "answers recorded after use"),
    ("every kind of bad answer from a server",
     "client::test_a_fault_is_tried_again client::test_an_endless"),
    ("deadlines, limits and budgets of calls", "client::test_a_call_ends_at_its_deadline "
     "client::test_requests_are_limited client::test_the_budget"),
    ("HTTP statuses and Retry-After", "server::test_every_status server::test_retry_after"),
    ("the key in any output, file or error",
     "server::test_the_key_is_nowhere server::test_keys_that_http "
     "server::test_a_key_in_place server::test_a_proxy_that flags::test_a_key_on_the_command_line",
     "server::test_the_key_is_nowhere_to_be_read", "what the server sent contains it"),
    ("netrc, proxies and certificates of the environment",
     "5*server::test_the_environment_is_not 3*server::test_no_key_to_a_proxy "
     "server::test_a_proxy_that_does_not"),
    ("redirects", "7*server::test_redirects_reach_nobody", "server::test_plain_requests",
     "plain `requests`"),
    ("judge addresses that are misleading",
     "server::test_addresses server::test_no_key_over_plain_http"),
    ("keys of stored answers: each field that is sent, and the fields that are not",
     "16*client::test_the_key_of_an_answer"),
    ("answers that were truncated or lack a verdict", "client::test_an_answer_without_a_verdict "
     "questions::test_too_many_unread questions::test_numbers_off"),
    ("answers without content, used to measure a judge", "judges::test_canaries_are_measured"),
    ("verdicts planted in a response", "24*questions::test_planted_verdicts",
     "questions::test_rules_that_look", "the first or last mention counts"),
    ("honest verdicts in unusual forms", "questions::test_honest_verdicts"),
    ("hostile responses in a judge's prompt", "2000*questions::test_two_thousand_hostile",
     "questions::test_a_fence_that", "a fence that is always the same"),
    ("pairs shown to a judge that prefers the first position",
     "pairs::test_a_judge_that_likes_the_first_place_is_measured"),
    ("interim responses, and responses that nobody asked for: no answer under another request",
     "connections::test_no_request_gets connections::test_every_interim "
     "connections::test_a_body_that_ends",
     "connections::test_a_connection_that_is_kept", "connections that are kept"),
    ("bytes that drip in status lines, headers, interim responses, chunks, trailers and tunnels",
     "connections::test_a_deadline_holds connections::test_a_tunnel connections::test_tls_is",
     "connections::test_timeouts_alone", "timeouts alone"),
    ("Ctrl-C, once and twice, while a server drips",
     "connections::test_a_second_interrupt connections::test_a_first_interrupt",
     "connections::test_threads_that_are", "threads that Python waits for"),
    ("a full disk under the answer file: named, and nothing more is sent",
     "answers::test_a_full_disk_ends.*ours", "answers::test_a_full_disk_ends.*no name",
     "errors as they come"),
    ("a changed name, value or byte in the answer file, and exchanged answers",
     "answers::test_one_changed answers::test_exchanged",
     "answers::test_old_lines_have", "lines without a checksum"),
    ("the key in other clothes, in errors and in answers",
     "server::test_the_key_is_in_no_error server::test_common_clothes",
     "server::test_errors_as_they_come", "errors as they come"),
    ("texts that know the hash of their question",
     "questions::test_a_text_that_knows.*ours questions::test_nonces_are "
     "questions::test_answers_to_the_hash",
     "questions::test_a_text_that_knows.*is sent", "the hash as the nonce"),
    ("nonces in disguise: other case, wide and bold letters, invisible characters, marks",
     "questions::test_no_part_of_a_text questions::test_a_nonce_in_disguise"),
    # What people and files say
    ("error messages, word for word, through the command line",
     "sentences:: house::test_every_message eval::test_a_mistake_is_one_line "
     "small_programs::test_mistakes 3*train::test_bad_input train::test_what_does_not_fit "
     "stop::test_every_error many::test_a_mistake_that_all_find servers::test_refusals "
     "client::test_flags_that"),
    ("code in a file", "4*damaged_files::test_code_in 2*peft_adapters::test_code_in "
     "convert_tool::test_code_in heads::test_a_damaged_head house::test_nothing_in_the_source",
     "damaged_files::test_code_in", "`pickle.load`"),
    ("shard names that point outside the folder", "20*hf_weights::test_shards_stay",
     "damaged_files::test_foreign_files", "a reader that joins paths"),
    ("small files that claim or expand to a huge size",
     "damaged_files::test_bombs convert_tool::test_bins_that_claim"),
    ("damaged config.json", "damaged_files::test_a_damaged_model_folder.*model/config"),
    ("one NaN, infinity or overflow in any tensor", "21*hf_weights::test_one_bad_number"),
    ("damaged safetensors of models and adapters",
     "damaged_files::test_a_damaged_model_folder.*safetensors"),
    ("damaged tokenizers and the files beside them",
     "damaged_files::test_a_damaged_model_folder.*model/(tok|add|spec) "
     "26*damaged_files::test_a_real_tokenizer.*aimed "
     "1000*damaged_files::test_a_real_tokenizer.*random"),
    ("a damaged tokenizer.json", "tokenizer_json::test_flipped_bytes "
     "tokenizer_json::test_a_damaged_tokenizer"),
    ("chat templates that are broken, hostile, or of another kind",
     "tokenizer_json::test_templates_that"),
    ("control tokens in what users and models say, under seven chat templates and four tokenizers",
     "50*tokenizer_json::test_users_and_models 300*tokenizer_json::test_what_users_say "
     "tokenizer_json::test_a_vocabulary_whose"),
    ("damaged adapter_config.json", "damaged_files::test_a_damaged_model_folder.*adapter_config"),
    ("damaged tasks, wordings, records, preferences and other data",
     "damaged_files::test_damaged_data 3*damaged_files::test_a_line_of_fifty"),
    ("target_modules as a regular expression that never ends",
     "peft_adapters::test_a_regular_expression_that_never_ends",
     "peft_adapters::test_python_does_not_end", "re.fullmatch in the process"),
    ("an adapter_model.bin of a few MB that unpacks to gigabytes",
     "convert_tool::test_adapters_that_unpack"),
    ("adapters that peft saves with the head or a resized vocabulary",
     "peft_adapters::test_an_adapter_on_the_head peft_adapters::test_an_adapter_of_a_resized"),
    ("a config that says tied, and another head in the file",
     "hf_weights::test_a_tied_config model::test_another_head convert_tool::test_another_head"),
    ("edited run folders", "edited_folders::"),
    ("memory that opening a checkpoint takes beside the weights",
     "hf_weights::test_loading_takes_little"),
    ("ids of real texts: those of transformers", "hf_tokenizer::test_ids_of_real_strings"),
    ("mistakes in config, weights, adapters, templates and flags",
     "hf_config::.*refus 18*hf_weights::test_sentences peft_adapters::.*refus lora::.*refus "
     "chat_templates::.*refus hf_tokenizer::.*refus outside_tasks::test_a_bad "
     "outside_records::test_a_bad 10*convert_tool::test_sentences 12*convert_tool::test_bins_run "
     "flags::.*refus finding::.*refused candidates::.*refused settings::.*refused "
     "eval::.*(refused|flags_of_extras) model::test_models_that losses::.*refused "
     "cat::.*refused cut::.*refused dpo::.*refused kto::.*refused orpo::.*refused "
     "ppo::.*refused reward::.*refused rso::.*refused"),
]


def select(tests: str, names) -> dict[str, int]:
    """{name: trials of each} of the names that a row's tests match.

    Raises pytest.UsageError where there is none.
    """
    found = {}
    for word in re.split(r" (?=[\d*]*\w+::)", tests):  # blanks inside a pattern stay
        times, pattern = re.fullmatch(r"(?:(\d+)\*)?(.*)", word).groups()
        hits = [name for name in names if re.match(pattern, name)]
        if not hits:
            raise pytest.UsageError(f"no test matches {pattern}. Correct ROWS in {__file__}.")
        found |= dict.fromkeys(hits, int(times or 1))
    return found


def short_name(item) -> str:
    """FILE::TEST.PARAMETERS of a test or a report on one."""
    name = re.sub(r"^tests/.*?test_(\w+)\.py", r"\1", item.nodeid)
    return name.replace("[", ".", 1).removesuffix("]")


class Collector:
    """A pytest plugin that runs the tests of some rows, and keeps what came of each of them."""

    def __init__(self, words: list[str]):
        self.words, self.rows, self.trials, self.found = words, [], {}, {}

    @pytest.hookimpl(tryfirst=True)  # before --quick drops the long tests
    def pytest_collection_modifyitems(self, items):
        """Keep the tests of the rows; raises UsageError if ROWS and the tests do not fit."""
        tests, known, wanted = {short_name(item): item for item in items}, set(), set()
        for what, patterns, *control in ROWS:
            row = {"what": what, "tests": select(patterns, tests), "controls": {}, "lacks": ""}
            if control:
                row |= {"controls": select(control[0], tests), "lacks": control[1]}
            both = row["tests"].keys() | row["controls"].keys()
            known |= both
            if any(words in what for words in self.words):
                self.rows.append(row)
                wanted |= both
        for name, item in tests.items():
            if item.get_closest_marker("faults") and name not in known:
                raise pytest.UsageError(f"no row has {name}. Add it to ROWS in {__file__}.")
            if hasattr(item, "callspec"):
                for parameter in COUNTS & item.callspec.params.keys():
                    value = item.callspec.params[parameter]
                    if isinstance(value, (int, tuple)):
                        self.trials[name] = value if isinstance(value, int) else len(value)
        items[:] = [item for name, item in tests.items() if name in wanted]

    def pytest_runtest_logreport(self, report):
        """Called for set-up, call and tear-down of each test."""
        name = short_name(report)
        row = self.found.setdefault(name, {"seconds": 0.0, "failed": False, "skipped": False})
        row["seconds"] += report.duration
        row["failed"] |= report.failed
        row["skipped"] |= report.skipped
        said = dict(report.user_properties).get("trials")
        row["trials"] = said or self.trials.get(name, 1)


def bound(failures: int, trials: int) -> float:
    """The failure rate that is not exceeded with 95 % confidence (Clopper-Pearson, one-sided)."""
    low, high = failures / trials, 1.0
    for _ in range(60):
        p, chance = (low + high) / 2, 0.0
        for k in range(failures + 1):
            chance += math.comb(trials, k) * p**k * (1 - p) ** (trials - k)
        if chance > 0.05:
            low = p
        else:
            high = p
    return high


def count(found: dict, tests: dict[str, int]) -> dict:
    """Trials, failed trials and seconds of a row's tests; a failed test is one failed trial."""
    total = {"trials": 0, "failed": 0, "seconds": 0.0}
    for name, times in tests.items():
        if name in found and not found[name]["skipped"]:
            total["trials"] += times * found[name]["trials"]
            total["failed"] += found[name]["failed"]
            total["seconds"] += found[name]["seconds"]
    return total


def table(found: dict, rows: list[dict]) -> tuple[str, list[dict]]:
    """The rows as Markdown, and as data; a test counts in the first row that has it."""
    lines, results, counted = [HEADER], [], set()
    for row in rows:
        tests = {name: n for name, n in row["tests"].items() if name not in counted}
        counted |= tests.keys()
        made, words, held, rate = count(found, tests), "", True, "not run"
        if row["controls"]:
            against = count(found, row["controls"])
            held = against["trials"] > 0 and not against["failed"]
            outcome = "fails" if held else "DOES NOT FAIL"
            words = f"{row['lacks']}: {outcome if against['trials'] else 'not run'}"
        if made["trials"]:
            rate = f"{100 * bound(made['failed'], made['trials']):.2g} %"
        results.append({"what": row["what"], **made, "control": words, "held": held})
        lines.append(f"| {row['what']} | {made['trials']:,} | {made['failed']} | {rate} | {words} "
                     f"| {made['seconds']:.0f} |")
    return "\n".join(lines), results


def main() -> int:
    """Run the tests, print the table; pytest's exit status, or 1 if a control did not run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the trials of the test suite")
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows with one of these words")
    parser.add_argument("--figures", help="also write the rows to this JSON file")
    args, started = parser.parse_args(), time.time()
    collector = Collector(args.rows)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(ROOT)
    marks = ["-m", "not faults"] if args.quick else []
    status = pytest.main(["-q", "-o", "addopts=--import-mode=importlib", *marks, "tests"],
                         plugins=[collector])
    if not collector.found:
        return status
    text, results = table(collector.found, collector.rows)
    trials = sum(row["trials"] for row in results)
    print(f"\n{text}\n\nIn all: {trials:,} trials in {time.time() - started:.0f} s.")
    if args.figures:
        Path(args.figures).write_text(json.dumps(results, indent=1) + "\n")
    return status or int(not all(row["held"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
