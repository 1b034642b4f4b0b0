"""The guard, of which `Alone` in train.py is the plain form; called in the same fixed order."""

import fcntl
import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

import data
from eval import pick_device
from extras.formats import templates
from extras.runtime import checkpoint, identity, ranks
from extras.runtime.files import read_keys, write_folder
from extras.runtime.streams import Disturbed, Watch
from methods import collate
from methods.early import BEST
from methods.finding import stages

FINISHED = ("adapter_config.json", "model")  # what tells that a stage is finished


class Stopped(BaseException):
    """Raised with a signal's number and where it stopped the run, at a point that loses nothing."""


class Guard:
    """One process of a run that can be stopped at any moment and goes on with the same bits."""

    def __init__(self, cfg):
        self.cfg, self.rank, self.size = cfg, int(os.environ.get("RANK", "0")), 1
        self.heard, self.waiting = 0, False  # the last signal; whether a step or a save goes on
        self.lock, self.watch = None, None  # the open run.lock; the log of the stage that trains
        self.checkpoint = None  # what the stage goes on from
        self.stage, self.step, self.recent = "", 0, []  # of the stage that trains; its last losses
        self.trained = False  # whether its last step is done, and it is saved next

    def sum(self, values: dict) -> dict:
        """{name: number} summed over all processes."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def share(self, items: list, work) -> list:
        """work(items), of which each process does a part; all get the results of one process."""
        if self.size == 1:
            return work(items)
        start, stop = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return ranks.gather(work(items[start:stop]) if start < stop else [])

    def first(self, action):
        """What the first process gets from action(), for all; if it fails, all stop."""
        def work():
            self.check_lock()
            return action()
        result = ranks.act_first(work, self.rank)
        if self.trained:  # and saved now: signals stop at once again
            self.trained = self.waiting = False
            number = max(ranks.gather([self.heard]))
            if number:
                raise Stopped(number, f" after {self.stage}, which is finished")
        return result

    def even(self, batches: list) -> list[tuple]:
        """(batch, weight). With --shard all processes have equally many: each needs all shards."""
        missing = 0
        if getattr(self.cfg, "shard", False):
            missing = max(ranks.gather([len(batches)])) - len(batches)
        return [(batch, 1) for batch in batches] + [(batches[-1], 0)] * missing

    def clip(self, parameters: list, most: float) -> float:
        """Sum gradients over all processes and clip them by their norm, which is returned."""
        if self.size > 1:
            ranks.sum_gradients([p for p in parameters if not ranks.is_spread(p)])
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        return float(norm.full_tensor() if ranks.is_spread(norm) else norm)

    def hear(self, number: int, frame) -> None:
        """Handle a signal: the first stops the run after the current step, another at once."""
        again, self.heard = self.heard, number
        if again or not self.waiting:
            raise Stopped(number, "")

    def keep(self, path: Path, records: list[dict]) -> None:
        """Append records that every process has to a file of the run, once."""
        self.first(lambda: data.append_records(path, records))

    def kept(self, path: Path, key) -> set:
        """The keys of the records that are in a file of the run, which is repaired."""
        return set(self.first(lambda: read_keys(path, key)))

    def check_lock(self) -> None:
        """Raise Disturbed if run.lock was removed, so that another process may have the folder."""
        if not self.lock:
            return
        path, own = Path(self.cfg.out, "run.lock"), os.fstat(self.lock.fileno())
        if not path.exists() or not os.path.samestat(path.stat(), own):
            raise Disturbed(f"{path} was removed or replaced while this process used the folder. "
                            "It writes nothing more, as another process may. Run the same command "
                            "again when none does; it goes on from the last checkpoint.")

    def open(self, run) -> None:
        """Lock the run; find the checkpoint to go on from, or remove the log of a try without."""
        def prepare() -> str:
            self.lock = self.lock or take_lock(Path(self.cfg.out))
            place = checkpoint.find_checkpoint(run.folder)
            run.folder.mkdir(parents=True, exist_ok=True)
            remove_half_written(run.folder)
            if not place:
                for name in checkpoint.GROWING:
                    (run.folder / name).unlink(missing_ok=True)
            templates.keep_template(getattr(self.cfg, "template", ""), run.folder)
            identity.record_inputs(run, place)
            return str(place or "")
        place = self.first(prepare)
        self.checkpoint = Path(place) if place else None

    def write(self, folder: Path, save) -> None:
        """save(temporary folder), and move that to `folder`; then the checkpoints are removed."""
        def publish(part: Path) -> None:
            for path in sorted(part.iterdir(), key=lambda path: path.name in FINISHED):
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                os.replace(path, folder / path.name)

        def save_all(part: Path) -> None:
            save(part)
            identity.record_result(folder, part)
        write_folder(folder / ".tmp-result", save_all, publish)
        shutil.rmtree(folder / checkpoint.FOLDER, ignore_errors=True)

    def resume(self, run, optimizer, make_items) -> tuple[list, dict]:
        """The items, and how far an earlier process came: {"step", "tokens", "seconds"}."""
        done = {"step": 0, "tokens": 0, "seconds": 0.0, "recent": []}
        if self.checkpoint:
            items, books = checkpoint.load_checkpoint(run, optimizer, self.checkpoint, make_items)
            done = {name: books[name] for name in done}
            run.say(f"{run.cfg.stage}: resuming at step {done['step']}.")
        else:
            items = make_items()
        self.recent, self.stage, self.step = done.pop("recent"), run.cfg.stage, done["step"]
        self.waiting, self.watch = True, None
        self.watch_log(run.folder / "log.jsonl")
        return items, done

    def watch_log(self, path: Path) -> str:
        """What happened to the log since the last call, which the first process looks after."""
        if self.watch:
            return self.watch.check()
        if path.exists() and not self.rank:
            self.watch = Watch(path)
        return ""

    def inspect(self, run, means: dict, norm: float, items: list[dict]) -> dict:
        """What to log of a jump of the loss. Raises FloatingPointError unless it is finite."""
        self.check_lock()
        if not math.isfinite(sum(means.values()) + norm):
            last = [f"step {int(x.name[5:])}" for x in checkpoint.saved_steps(run.folder)]
            raise FloatingPointError(
                f"step {self.step} of {self.stage} gave a non-finite loss or gradient norm "
                f"({means}, norm {norm}; records {self.find_culprits(run, items)}); nothing was "
                f"updated. Last checkpoint: {[*last, 'none'][0]}. Try a lower --lr with another "
                "--out, or look at those records.")
        loss = sum(means[term] for term in getattr(run.method, "WATCHED", run.method.TERMS))
        recent, self.recent = self.recent, [*self.recent, loss][-10:]
        # A loss that rose, to more than three times the mean of the last ten.
        if not (len(recent) == 10 and loss > recent[-1] and loss > 0.3 * sum(recent) > 0):
            return {}
        names = list_names(items)
        run.say(f"warning: the loss of {self.stage} jumped at step {self.step} (records {names}).")
        return {"spike": names}

    def find_culprits(self, run, items: list[dict]) -> str:
        """The names of the items whose own loss is not finite, or of all; in every process."""
        bad, device = [], next(run.model.parameters()).device
        if hasattr(run.method, "prepare"):  # whose steps need statistics of all
            return list_names(items)
        for item in items:
            batch = collate([item], run.model, device) | {"step": self.step}
            with torch.no_grad(), run.precision():
                terms = run.method.step(run.model, batch, run.cfg)
            if not all(value.isfinite() for value in terms.values()):
                bad.append(item)
        return list_names(bad or items)

    def after_step(self, run, optimizer, items: list[dict], done: dict) -> None:
        """Write a checkpoint if one is due or the run is to stop; raises Stopped or Disturbed."""
        cfg, self.step = run.cfg, done["step"]
        found = ranks.gather([(self.heard, self.watch_log(run.folder / "log.jsonl"))])
        number, problem = max(heard for heard, _ in found), max(said for _, said in found)
        self.trained = self.step == cfg.steps
        if self.trained and cfg.full and getattr(cfg, "shard", False):
            run.model = ranks.gather_model(run.model, self.rank, pick_device(cfg)[1])
        if self.trained:
            if problem:
                run.say(f"warning: {problem}.")
            return
        if number or problem or cfg.save_every and self.step % cfg.save_every == 0:
            books = done | {"recent": self.recent}
            checkpoint.save_checkpoint(run, optimizer, items, books)
        if problem:
            raise Disturbed(f"{problem}. Step {self.step} of {cfg.stage} is saved. The same command"
                            " goes on from there.")
        if number:
            raise Stopped(number, f" after step {self.step} of {cfg.stage}, which is saved")


def list_names(items: list[dict]) -> str:
    """The names of the records of items, at most five."""
    names = list(dict.fromkeys(item.get("name", "without a name") for item in items))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def remove_leftovers(out: Path) -> None:
    """Remove what a process that was killed at the end of a stage has left beside its result."""
    for folder in (out, *(out / name for name in stages()), *out.glob("round*")):
        if any((folder / name).exists() for name in FINISHED):
            for name in (checkpoint.FOLDER, BEST):
                shutil.rmtree(folder / name, ignore_errors=True)
            remove_half_written(folder)


def remove_half_written(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has not given its name."""
    for pattern in (".tmp-*", f"{checkpoint.FOLDER}/.tmp-*", "*.json*.part"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def take_lock(folder: Path):
    """Lock RUN/run.lock until it is closed or this process ends; ValueError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "run.lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{folder} is in use by {file.read(200).strip() or 'another process'}. "
                         "Wait for it, or choose another --out.") from None
    file.truncate(0)
    print(f"process {os.getpid()} on {os.uname().nodename}", file=file, flush=True)
    return file
