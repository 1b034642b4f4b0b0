"""What was tried to break it, how often, and what came of it: the table of the README's reliability section.

    python bench/faults.py                     # 12 minutes on two cores; exit status 1 if anything failed
    python bench/faults.py --quick             # the trials that run with the test suite

Each row is a fault or an attack, made by the named tests, so and so many times; "below" is the 95 % bound that no failure in
so many trials gives. A row's control is the same trial against a version that lacks the care: it must fail, or the row shows nothing.
"""
import argparse
import json
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

ROWS = [  # what; tests; trials in each of them that does not say itself; its control, and what that is
    ("kill -9 while checkpoints are written", "faults::test_kills_while_saving_leave_the_last_checkpoint_whole.ours", 1,
     "faults::test_kills_while_saving_leave_the_last_checkpoint_whole.in place", "files written in place"),
    ("kill -9 of whole runs, 3 each: the same bytes in the end", "faults::test_a_run_killed_at_random_moments", 3,
     "faults::test_whatever_a_checkpoint_leaves_out_is_missed", "a checkpoint that lacks a part"),
    ("stopped at each of several steps, resumed: the same bytes", "faults::test_a_run_stopped_at_each_step_resumes_there", 2,
     "faults::test_whatever_a_checkpoint_leaves_out_is_missed", "a checkpoint that lacks a part"),
    ("a damaged checkpoint", "faults::test_a_damaged_checkpoint|faults::test_no_whole_checkpoint", 1, "", ""),
    ("the n-th call of a save fails: no room, a bad disk, no permission, Ctrl-C", "faults::test_a_save_that_fails_leaves_the_one_before", 1, "", ""),
    ("order of writes, modes, run folders that are links or closed", "faults::test_files_are_synced|terminal::test_places_that|faults::test_a_run_folder_may|model::test_modes", 1, "", ""),
    ("other settings, inputs or a lost log at a resume", "faults::test_other_settings|faults::test_changed_inputs|faults::test_settings_that", 1, "", ""),
    ("a full disk", "faults::test_a_full_disk", 1, "", ""),
    ("SIGTERM and Ctrl-C, during a step and at random moments", "faults::test_a_signal_stops_behind_the_step|faults::test_signals_at_random_moments", 1, "", ""),
    ("two processes that start at once in one folder", "hostile::test_two_processes|faults::test_a_folder_in_use", 1, "", ""),
    ("kill -9 of what writes records", "faults::test_kills_while_recording_lose_no_record_that_was_reported.ours", 1,
     "faults::test_kills_while_recording_lose_no_record_that_was_reported.unmended", "the torn end is left"),
    ("kills while 240 answers are sampled: none again, the same bytes", "faults::test_answers_collected_before", 1, "", ""),
    ("records that are there twice, or contradict each other", "faults::test_records_that_are_there_twice", 300, "", ""),
    ("a record file cut at every byte", "client::test_a_torn_last_line_at_every_byte|data::test_records_round_trip", 1, "", ""),
    ("damage within a record file: refused, left alone", "hostile::test_damage_that_is_not_at_the_end|client::test_damage_elsewhere", 1, "", ""),
    ("hostile texts in records, on the screen and in reports", "hostile::test_hostile_texts", 1, "", ""),
    ("NaN, infinity, 3e38 in a loss or gradient, 1 and 2 processes", "faults::test_a_bad_number_changes_no_bit", 1,
     "faults::test_clipping_alone_would_have_spread_it", "clipping alone"),
    ("losses that jump, and clean steps", "faults::test_planted_spikes", 2020, "", ""),
    ("log(1 - p) at margins up to 200", "losses::test_complement_is_finite", 5, "", ""),
    ("every loss of answers without a word, and rows without a target", "faults::test_every_loss_of|faults::test_rows_without", 1, "", ""),
    ("losses and figures at their limits", "faults::test_figures_at_their_limits", 1, "", ""),
    ("samplers at their limits", "hostile::test_a_sampler|model::test_refused_requests", 1, "", ""),
    ("records and figures of 1, 2, 3, 4 processes", "faults::test_processes_share_sampling", 1, "", ""),
    ("shards of 2 and 3 processes: losses and weights of one", "faults::test_shards_train_as_one_process_does|faults::test_each_process_reads", 1, "", ""),
    ("resumed with another number of processes", "faults::test_a_run_of_two_processes_goes_on", 1, "", ""),
    ("a mistake under torchrun is one line of ours", "faults::test_a_mistake_is_one_line|faults::test_what_one_process_alone|faults::test_two_machines", 1, "", ""),
    ("a server that fails rank 0; asked by rank 0 alone", "faults::test_a_server_", 1, "", ""),
    ("calls of a judge that go wrong in 20 % of the tries", "client::test_a_thousand_calls_through_every_fault", 1000, "", ""),
    ("kill -9 of 600 paid calls: none asked again", "client::test_twenty_kills|client::test_a_kill_costs_what_was_under_way_and_no_more.ours", 20,
     "client::test_a_kill_costs_what_was_under_way_and_no_more.recorded after use", "answers recorded after use"),
    ("bad answers of a server, each kind", "client::test_a_fault_is_tried_again|client::test_an_endless", 1, "", ""),
    ("deadlines, limits and budgets of calls", "client::test_a_call_ends_at_its_deadline|client::test_requests_are_limited|client::test_the_budget", 1, "", ""),
    ("HTTP statuses and Retry-After", "client::test_every_status|client::test_retry_after", 1, "", ""),
    ("the key in any output, file or error", "client::test_the_key_is_nowhere|client::test_keys_that_http_cannot|client::test_nothing_of_a_password", 1, "client::test_the_key_is_nowhere_to_be_read", "what the server sent holds it"),
    ("netrc, proxies and certificates of the environment", "client::test_the_environment_is_not|client::test_no_key_to_a_proxy", 5, "", ""),
    ("redirects", "client::test_redirects_reach_nobody", 7, "client::test_plain_requests_would_follow_them", "plain requests"),
    ("addresses of judges that are not what they seem", "client::test_addresses|client::test_no_key_over_plain_http", 1, "", ""),
    ("what a stored answer answers: each field that is sent, and those that are not", "client::test_the_key_of_an_answer", 16, "", ""),
    ("answers that were cut off, or lack a verdict", "client::test_an_answer_without_a_verdict|client::test_too_many_unread|client::test_numbers_off", 1, "", ""),
    ("answers without content, to measure a judge by", "judge_stages::test_canaries", 1, "", ""),
    ("verdicts planted in a response", "client::test_planted_verdicts_are_not", 24, "client::test_rules_that_look_for_a_word_are_fooled", "first or last mention"),
    ("honest verdicts in odd shapes", "client::test_honest_verdicts_are_read", 1, "", ""),
    ("hostile responses in a judge's prompt", "client::test_two_thousand_hostile_responses", 2000, "client::test_a_fence_that_is_always_the_same", "a fence that is always the same"),
    ("pairs before a judge that likes the first place", "hostile::test_a_judge_that_likes_the_first_place_is_measured", 1, "", ""),
    ("the sentences of the plan, through the command line", "hostile::test_every_sentence", 1, "", ""),
    ("code in a file", "hostile::test_code_in_a_file|hostile::test_nothing_in_the_source", 1, "hostile::test_the_same_code_runs", "pickle.load"),
    ("names of shards that lead outside", "model::test_shards_stay_in_their_folder", 20, "hostile::test_a_reader_that_joins_paths", "a reader that joins paths"),
    ("bombs: small files that want to be large", "hostile::test_bombs", 1, "", ""),
    ("damaged config.json", "hostile::test_a_damaged_model_folder_loads_right_or_is_refused.model/config.json", 1, "", ""),
    ("one NaN, infinity or overflow in any tensor", "model::test_one_bad_number", 1, "", ""),
    ("damaged safetensors of models, adapters and heads", "hostile::test_a_damaged_model_folder_loads_right_or_is_refused.*safetensors", 1, "", ""),
    ("damaged tokenizers and what lies beside them", "hostile::test_a_real_tokenizer|hostile::test_a_damaged_model_folder_loads_right_or_is_refused.model/.*tok", 1, "", ""),
    ("damaged adapter_config.json", "hostile::test_a_damaged_model_folder_loads_right_or_is_refused.adapter/adapter_config", 1, "", ""),
    ("damaged tasks, wordings, records, preferences, ...", "hostile::test_damaged_data|hostile::test_a_line_of_fifty", 1, "", ""),
    ("edited run folders", "hostile::test_a_damaged_run_folder", 1, "", ""),
    ("mistakes in config, weights, adapters, templates, flags", "model::.*refus|lora::.*refus|formats::.*refus|templates::.*refus|terminal::test_mistakes", 1, "", ""),
]


class Collector:
    """A pytest plugin that keeps the outcome, the duration and the trials of each test."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        name = re.sub(r"^tests/test_|\.py", "", report.nodeid).replace("[", ".").removesuffix("]")
        seconds, _, trials = self.found.get(name, (0.0, "passed", None))
        failed = report.failed or self.found.get(name, (0, "passed"))[1] == "failed"
        skipped = report.skipped or self.found.get(name, (0, "passed"))[1] == "skipped"
        self.found[name] = (seconds + report.duration, "failed" if failed else "skipped" if skipped else "passed", dict(report.user_properties).get("trials", trials))


def bound(failures: int, trials: int) -> float:
    """The share of failures that is not exceeded with 95 % confidence (Clopper-Pearson, one-sided)."""
    from math import comb

    low, high = failures / trials, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if sum(comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(failures + 1)) > 0.05 else (low, p)
    return high


def outcome(found: dict, pattern: str, each: int) -> tuple[int, int, float]:
    """Trials, failed ones and seconds of the tests that a pattern names; a test that fails counts as one failed trial."""
    mine = [row for name, row in found.items() if re.match(pattern, name) and row[1] != "skipped"]
    return sum(trials or each for *_, trials in mine), sum(state == "failed" for _, state, _ in mine), sum(seconds for seconds, *_ in mine)


def table(found: dict) -> tuple[str, list[dict]]:
    """The rows as Markdown, and as data."""
    lines, rows = ["| fault or attack | trials | failed | below, with 95 % | control, which must fail | s |", "| --- | --- | --- | --- | --- | --- |"], []
    for what, pattern, each, control, words in ROWS:
        trials, failed, seconds = outcome(found, pattern, each)
        against = outcome(found, control, 1) if control else (0, 0, 0)
        held = not control or against[0] > 0 and not against[1]
        rows.append({"what": what, "trials": trials, "failed": failed, "control": words, "held": held, "seconds": round(seconds, 1)})
        lines.append(f"| {what} | {trials:,} | {failed} | {f'{100 * bound(failed, trials):.2g} %' if trials else 'not run'} | "
                     f"{words + (': fails' if held else ': DOES NOT FAIL') if control else ''} | {seconds:.0f} |")
    return "\n".join(lines), rows


def main() -> int:
    import pytest

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the trials that run with the test suite")
    parser.add_argument("--figures", default="", help="write the rows as JSON")
    flags, collector, started = parser.parse_args(), Collector(), time.time()
    os.chdir(Path(__file__).parent.parent)
    groups = defaultdict(list)
    for part in {part for _, pattern, _, control, _ in ROWS for part in [*pattern.split("|"), *([control] if control else [])]}:
        groups[part.partition("::")[0]].append(part.partition("::")[2].partition(".")[0] or part.partition("::")[2])
    words = " or ".join(sorted({name if re.fullmatch(r"\w+", name) else "refus" for names in groups.values() for name in names}))
    files = [f"tests/test_{name}.py" for name in sorted(groups)]
    pytest.main(["-q", "-o", "addopts=", *files, "-k", words, *(["-m", "not faults"] if flags.quick else [])], plugins=[collector])
    text, rows = table(collector.found)
    print(f"\n{text}\n\n{sum(row['trials'] for row in rows):,} trials in {time.time() - started:.0f} s.")
    if flags.figures:
        Path(flags.figures).write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["failed"] or not row["held"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
