"""Where the settings of a run come from.

A flag's default < its stage's (DEFAULTS) < the demo's (demo/settings.json, if the demo's model and
tasks are used) < those of the run that is continued < the command line.
"""

from dataclasses import fields
from pathlib import Path

from eval import extra
from methods.common import CommonFlags
from methods.defaults import demo_settings, fill_paths
from methods.finding import find_method
from methods.flags import check_flags, flag_names, parse_flags, same
from methods.folders import (  # noqa: F401
    FREE,
    OWN,
    config_class,
    has_result,
    is_finished,
    save_settings,
    saved_settings,
)


def parse_config(argv: list[str]):
    """Command line -> (settings, method). Raises ValueError for a mistake."""
    words = []
    for word in argv:  # --flag=value is --flag value
        words += word.split("=", word.startswith("--"))
    follows = dict(zip(words, words[1:], strict=False))
    stage = follows.get("--stage", "cat")
    method, plain = find_method(stage), "--plain" in words
    out = follows.get("--out") or f"runs/{Path(stage).stem}"
    before = continued_settings(method, stage, Path(out), follows.get("--init", ""))
    # The flags of a server are there if one is asked.
    asked = [before.get(name) for name in ("judge", "critic", "agreement_by")]
    server = "http" in (*words, *asked)
    flags = config_class(method, plain=plain, server=server)
    title = f"python train.py --stage {stage} [flags]\n\n{method.__doc__.splitlines()[0]}"
    given = parse_flags(flags, words, title, method.DEFAULTS, method.unread) | {"out": out}
    if {"steps", "epochs"} <= given.keys():
        raise ValueError("--steps and --epochs both say how long to train. Leave one of them out.")
    if "steps" in given:
        before = before | {"epochs": 0.0}
    # Each of these goes before the ones to its left.
    values = method.DEFAULTS | demo_settings(method, given, before) | before | given
    known = flag_names(flags)  # the demo has settings for several stages
    cfg = flags(**{name: value for name, value in values.items() if name in known})
    cfg = fill_paths(cfg, method)
    check_flags(cfg)
    method.check(cfg)
    if server and extra("judges", plain):
        extra("judges", plain).check_flags(cfg, asked=True)
    return cfg, method


def continued_settings(method, stage: str, out: Path, init: str) -> dict:
    """The settings of the run that is continued: the one in --out, or a stage in --init.

    Raises ValueError if --init holds no finished run of the stage that this one continues.
    """
    saved, needs = saved_settings(out), method.needs
    if same(saved.get("stage"), stage):
        return saved
    if not init:
        return {}
    before = {}
    for folder in (Path(init), Path(init) / needs):
        found = saved_settings(folder)
        if found.get("stage") == needs and has_result(folder):
            before = found
            if not {"steps", "lr"} <= found.keys():
                raise ValueError(f"{folder}/config.json lacks steps or lr. Restore it, or give "
                                 "another --init.")
    if not before:
        raise ValueError(f"--init {init} holds no finished run of stage {needs}. Give another "
                         "folder, or leave --init out and the stage is trained.")
    saved = saved_settings(Path(init))
    if same(saved.get("stage"), stage):  # another run of the same stage
        return {name: value for name, value in saved.items() if name not in FREE}
    # The earlier stage's own steps and rate are --sft-steps and --sft-lr here.
    names = flag_names(config_class(find_method(needs)))
    names -= FREE | OWN | {"stage"}
    found = {name: value for name, value in before.items() if name in names}
    return found | {"sft_steps": before["steps"], "sft_lr": before["lr"]}


def stage_config(cfg, name: str):
    """This run's settings for an earlier stage: as given, but its own steps, rate and batch."""
    method, values, asker = find_method(name), {}, find_method(cfg.stage)
    server = hasattr(cfg, "judge_url") and hasattr(method.Flags, "judge")
    flags = config_class(method, plain=cfg.plain, server=server)
    for item in fields(flags):
        if hasattr(cfg, item.name):
            values[item.name] = getattr(cfg, item.name)
    values["batch_size"] = method.DEFAULTS.get("batch_size", CommonFlags.batch_size)
    if hasattr(cfg, "sft_steps"):
        values |= {"steps": cfg.sft_steps, "lr": cfg.sft_lr, "epochs": 0.0, "validation": 0.0}
    values |= asker.also_needs(cfg).get(name, {})
    made = flags(**values | {"stage": name, "out": f"{cfg.out}/{name}"})
    made.asked_as = {"steps": "sft_steps", "lr": "sft_lr"}  # by the flags of this run
    return made
