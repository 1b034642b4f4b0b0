"""Pages, plots and further metrics. The course calls the names below."""

from extras.reports.controls import add_controls, describe, print_notes
from extras.reports.metrics import MoreMetrics, sampled_kl
from extras.reports.report import write_report
from extras.reports.runs import report_judged, report_rewards, report_run

__all__ = ["MoreMetrics", "add_controls", "add_flags", "describe", "print_notes", "report_judged",
           "report_rewards", "report_run", "sampled_kl", "write_report"]


def add_flags(add) -> None:
    """The flags of eval.py that only this room reads; `add` is argparse's add_argument."""
    add("--cluster", choices=("clique", "component", "greedy"), default="clique",
        help="that MCR uses")
    add("--use-stemmer", action="store_true", help="Porter stemmer in ROUGE")
    add("--reference", default="", help="adapter to which the KL of each model is measured")
    add("--controls", choices=("auto", "all", "none"), default="auto",
        help="baselines for CR; auto: unless a judge would have to be asked")
