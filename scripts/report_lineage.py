"""What is known about weights and about every stage before them: their files, metadata, logs and data.

    stages = lineage(Path("out/agent_256.pth"))     # oldest first

A stage names the weights it began with by name and checksum; the walk goes from file to file as long as the
checksum is the one that was recorded, and ends with a sentence where it is not.
"""

import contextlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPARED = ("loss", "tokens", "time_s", "val_loss", "reward")  # what ties a log to weights


@dataclass
class Stage:
    """One box of the lineage: a weight file, or a sentence (`ends`) where there should be one."""

    name: str  # full_sft, of full_sft_512.pth
    path: Path | None = None
    status: str = "chosen"  # verified, not verified, gone, changed, damaged, cycle, origin
    ends: str = ""  # why the lineage ends here
    note: str = ""
    metadata: dict = field(default_factory=dict)
    parameters: int = 0
    sha256: str = ""
    log: Path | None = None
    log_note: str = ""
    records: list[dict] = field(
        default_factory=list
    )  # lines of the log with a step, up to that of the weights
    before: "Stage | None" = None  # the stage it began with, where its weights are there
    sittings: list[dict] = field(default_factory=list)  # what was recorded of its start and of every resume

    @property
    def kind(self) -> str:
        return str(self.metadata.get("stage") or self.name)

    @property
    def is_adapter(self) -> bool:
        return "lora" in self.metadata

    def number(self, name: str) -> float | None:
        """A figure of the run as it was when the weights were saved; None when nobody wrote it down."""
        found = as_dict(self.metadata.get("metrics")).get(name)
        if not is_number(found):
            values = [r[name] for r in self.records if is_number(r.get(name))]
            found = values[-1] if values else None
        return found


def real(stages: list[Stage]) -> list[Stage]:
    """The stages whose weights are there."""
    return [stage for stage in stages if stage.path is not None]


def as_dict(value) -> dict:
    """What should be a dictionary, in a file that anybody may have written."""
    return value if isinstance(value, dict) else {}


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------------------
# From file to file
# ------------------------------------------------------------------------------------------------------------


def lineage(path: Path) -> list[Stage]:
    """The stages of a weight file, oldest first. Raises CheckpointError when the file itself cannot be
    read."""
    stages = [read_stage(path)]
    while not stages[-1].ends:
        parent = stages[-1].metadata.get("parent")
        if not isinstance(parent, dict):
            break
        seen = {stage.path.resolve() for stage in stages}
        stages.append(find_parent(stages[-1], parent, seen))
        stages[-2].before = stages[-1] if stages[-1].path else None
    return stages[::-1]


def find_parent(child: Stage, parent: dict, seen: set[Path]) -> Stage:
    """The stage that `parent` ({"weight": name, "step": ..., "crc32": ...}) names, or one that says why it
    cannot be shown."""
    from trainer.checkpoint import CheckpointError, shown

    name, crc = str(parent.get("weight")), parent.get("crc32")
    if child.kind == "imported":
        return Stage(name, status="origin", ends=f"imported from a transformers folder of type {name}")
    folder = folder_of(child.path)
    config = as_dict(child.metadata.get("config"))
    tail = f"_{config.get('hidden_size')}{'_moe' if config.get('use_moe') else ''}.pth"
    recorded = f"step {parent.get('step')}, crc32 {crc}"
    if "/" in name or "\\" in name:
        return Stage(name, status="gone", ends=f"the parent's name is no file name ({recorded})")
    place = folder / f"{name}{tail}"
    path = place if place.exists() and crc in (None, written_checksum(place)) else None
    if path is None and crc is not None:  # perhaps under another name
        others = sorted(p for p in folder.glob(f"*{tail}") if p != place)
        path = next((p for p in others if written_checksum(p) == crc), None)
    if path is None and not place.exists():
        return Stage(name, status="gone", ends=f"{shown(place)} is gone ({recorded})")
    if path is None:
        own = " (by this very stage)" if place.resolve() in seen else ""
        ends = (
            f"{shown(place)} has changed since{own}: its crc32 is now {written_checksum(place)}, the stage "
        )
        return Stage(name, status="changed", ends=ends + f"began with {recorded}")
    if path.resolve() in seen:
        return Stage(name, status="cycle", ends=f"{shown(path)} stands among its own ancestors: a cycle")
    try:
        stage = read_stage(path)
    except CheckpointError as error:
        return Stage(name, status="damaged", ends=str(error))
    stage.status = "verified" if crc is not None else "not verified"
    if crc is None:
        stage.note = "the stage after it recorded no checksum of it (a file of another project)"
    elif path != place:
        stage.note = f"found by its checksum: the stage after it knew it as {place.name}"
    return stage


def folder_of(path: Path) -> Path:
    """The folder of whole weights, logs and results: out, also for an adapter in out/lora."""
    return path.parent.parent if path.parent.name == "lora" else path.parent


def written_checksum(path: Path) -> int | None:
    """The checksum in a weight file's metadata, without reading its tensors; None when there is none."""
    from trainer import checkpoint

    with contextlib.suppress(checkpoint.CheckpointError):
        return as_dict(checkpoint.read_file(path, mmap=True).get(checkpoint.METADATA)).get("crc32")


def read_stage(path: Path) -> Stage:
    """All about one weight file; its tensors are checked against its checksum. Raises CheckpointError."""
    from trainer import checkpoint, progress

    state, metadata = checkpoint.read_weights(path)
    parameters = sum(tensor.numel() for tensor in checkpoint.distinct_tensors(state))
    del state
    name = re.sub(r"_\d+(_moe)?$", "", path.stem)
    stage = Stage(name, path, metadata=metadata, parameters=parameters, sha256=progress.sha256_of(path) or "")
    if not metadata:
        stage.ends = (
            "a file without metadata, written by another project: where it comes from is not recorded"
        )
    found = metadata.get("sittings")
    stage.sittings = [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []
    read_log_of(stage)
    return stage


# ------------------------------------------------------------------------------------------------------------
# Logs
# ------------------------------------------------------------------------------------------------------------


def read_log_of(stage: Stage):
    """Find the log that these weights are of: the one of their name, or any other in the folder whose figures
    at the step of the weights are those in their metadata."""
    from trainer.checkpoint import shown
    from trainer.progress import read_log

    folder = folder_of(stage.path)
    places = [folder / f"{stage.name}_log.jsonl", stage.path.parent / f"{stage.name}_log.jsonl"]
    named = next((p for p in places if p.is_file()), None)
    others = sorted(p for p in folder.glob("*_log.jsonl") if p != named)
    for place in [*([named] if named else []), *others]:
        try:
            lines = read_log(place)
        except OSError:
            continue
        agrees = belongs(lines, stage.metadata)
        if agrees or (agrees is None and place == named):
            break
    else:
        there = (
            f": {shown(named)} is of another run, its figures are not those of these weights" if named else ""
        )
        stage.log_note = f"no log{there}"
        return
    last = stage.metadata.get("step")
    steps = [line for line in lines if type(line.get("step")) is int]
    kept = [line for line in steps if not is_number(last) or line["step"] <= last]
    stage.log, stage.records = place, [line for line in kept if "event" not in line]
    stage.log_note = (
        " (found by name: the weights hold no figures to compare it with)" if agrees is None else ""
    )
    with place.open("rb") as file:
        broken = sum(bool(line.strip()) for line in file) - len(lines)
    if broken:
        stage.log_note += f" ({broken} line{'s' * (broken > 1)} of it could not be read)"
    headers = [line for line in steps if "event" in line]
    first = stage.sittings[0].get("event") if stage.sittings else None
    if headers and first != "start":  # weights of before this was in their metadata
        stage.sittings = headers
    elif headers and stage.sittings:
        stage.sittings[0] = {**stage.sittings[0], "args": headers[0].get("args")}


def belongs(lines: list[dict], metadata: dict) -> bool | None:
    """Whether a log says at the step of the weights what their metadata says; None when there is nothing to
    compare."""
    step, metrics = metadata.get("step"), metadata.get("metrics")
    latest: dict = {}
    for line in lines:
        if type(line.get("step")) is int and (not is_number(step) or line["step"] <= step):
            latest |= line
    if not isinstance(metrics, dict):
        return None
    both = [name for name in COMPARED if name in metrics and name in latest]
    return all(metrics[name] == latest[name] for name in both) if both else None


def figures(stage: Stage, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric in the log; of lines with one step the last counts."""
    found = {line["step"]: line[name] for line in stage.records if is_number(line.get(name))}
    return sorted(found), [found[step] for step in sorted(found)]


# ------------------------------------------------------------------------------------------------------------
# Data, commands, settings
# ------------------------------------------------------------------------------------------------------------


def first_sitting(stage: Stage) -> dict:
    return stage.sittings[0] if stage.sittings else {}


def arguments(stage: Stage) -> dict:
    return as_dict(first_sitting(stage).get("args"))


def data_files(stage: Stage) -> list[tuple[str, str, str]]:
    """(path as typed, SHA-256, what is known about it now) of every file that a stage read."""
    from trainer.progress import sha256_of

    sitting = first_sitting(stage)
    files = as_dict(sitting.get("data")).get("files")
    if not isinstance(files, list):  # weights of before this was recorded
        typed = arguments(stage).get("data_path")
        files = [{"path": part.strip()} for part in typed.split(",")] if isinstance(typed, str) else []
    found = []
    for file in (f for f in files if isinstance(f, dict)):
        path, recorded = str(file.get("path")), file.get("sha256")
        bases = [*typed_in(stage), ROOT, Path.cwd()]
        place = next((base / path for base in bases if (base / path).is_file()), None)
        now = sha256_of(place) if place else None
        if recorded is None:
            state = "as the file is now; not recorded in training" if now else "not recorded, file is gone"
        else:
            state = "unchanged" if now == recorded else "changed since" if now else "file is gone"
        found.append((path, str(recorded or now or ""), state))
    return found


def typed_in(stage: Stage) -> list[Path]:
    """Folders that relative paths of a stage's command may start from: the one that was recorded, and the one
    from which --save_dir leads to where the weights lie now."""
    recorded, save_dir = first_sitting(stage).get("folder"), arguments(stage).get("save_dir")
    bases = [Path(recorded)] if isinstance(recorded, str) else []
    if isinstance(save_dir, str) and not Path(save_dir).is_absolute():
        here, parts = folder_of(stage.path).resolve(), Path(save_dir).parts
        if parts and here.parts[-len(parts) :] == parts:
            bases.append(here.parents[len(parts) - 1])
    return bases


def command_to_repeat(stage: Stage) -> str | None:
    """The command of the run's start; a run by the clock gets the number of steps that it turned into."""
    command = first_sitting(stage).get("command")
    if not isinstance(command, str) or not command.strip():
        return None
    steps = stage.metadata.get("total_steps")
    if re.search(r"--max_minutes\b", command) and "--max_steps" not in command and is_number(steps):
        command += f" --max_steps {steps}"
    return command


# ------------------------------------------------------------------------------------------------------------
# Sums
# ------------------------------------------------------------------------------------------------------------


def energy_of(stage: Stage, watts: float | None) -> tuple[float | None, str]:
    """(watt-hours, where the number comes from): counted by the hardware; or --watts x time, an estimate; or
    None."""
    joules, seconds = stage.number("energy_j"), stage.number("time_s")
    if joules is not None:
        return joules / 3600, "counted"
    if watts is not None and seconds is not None:
        return watts * seconds / 3600, "estimate"
    return None, "not available"


def total(values: list) -> tuple[float | None, str]:
    """(sum of what is known, "at least " when something is not)."""
    known = [value for value in values if value is not None]
    return (sum(known) if known else None), ("at least " if len(known) < len(values) and known else "")
