"""What happens between the first and the last line of every stage, written once; no algorithm lives here.

run = loop.Run("full_sft", args, rt, tokenizer, path, train, val)
model = run.load(checkpoint.new_model(args, tokenizer, rt))     # --from_weight, or what --from_resume 1 finds
model, optimizers = run.prepare(model)                          # compiled, wrapped for torchrun

def update(step, micro_batches, lr_factor):                     # the stage's own: one optimizer step
    return loop.optimizer_step(model, micro_batches, optimizers, lr_factor, args, rt, next_token_loss)

run.fit(model, optimizers, update, validate)                  # steps, log lines, validations, saves
run.end(model, "python eval_llm.py")                          # the last lines
"""

from __future__ import annotations

import functools

from trainer import batches, checkpoint, cli, optim, progress, runtime


def optimizer_step(
    model, micro_batches, optimizers, lr_factor, args, rt, micro_loss, counts=None, refuse=None
) -> dict:
    """One optimizer step over micro-batches and processes; returns what the log wants.

    counts: what this process divides its sums by, {"loss": its targets, ...}; default: targets for "loss",
    micro-batches for "aux_loss". Before the first backward pass they are added up over all processes.
    micro_loss(model, batch, totals) -> (this micro-batch's share of the loss, {name: sum for the log}), where
    `totals` are those counts of the whole step. A sum whose name has no count is counted as "loss" is.
    A step in which there is nothing to learn (zero for "loss") changes nothing and is counted.
    refuse(means) -> bool, asked before the optimizers move: True leaves everything as it was, momentum too,
    and the log's line says "refused". means: every sum over all processes, divided by its count.
    """
    lr = optim.set_lr(optimizers, lr_factor)
    if counts is None:
        counts = {"loss": micro_batches.num_targets, "aux_loss": len(micro_batches)}
    totals = dict(zip(counts, runtime.total(list(counts.values()), rt)))
    if totals["loss"] == 0:
        rt.skipped += 1
        return {"lr": lr}
    sums: dict = {}
    for i, batch in enumerate(micro_batches):
        with runtime.no_sync(model, rt, last=i + 1 == len(micro_batches)):
            with rt.autocast():
                loss, parts = micro_loss(model, batch, totals)
            runtime.backward(loss, rt)
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.detach()
    if refuse is not None:
        names = sorted(sums)
        added = dict(zip(names, runtime.total([float(sums[name]) for name in names], rt)))
        if refuse({name: added[name] / max(totals.get(name, totals["loss"]), 1) for name in names}):
            model.zero_grad(set_to_none=True)
            return {"lr": lr, "refused": (1, 1)}
    grad_norm = runtime.optimizer_step(model, optimizers, rt, args.grad_clip)
    ratios = {name: (total, counts.get(name, counts["loss"])) for name, total in sums.items()}
    return {"lr": lr, "grad_norm": grad_norm, "num_tokens": micro_batches.num_tokens, **ratios}


class Run:
    """One run of a stage: its data, where it comes from, and its files.

    `save_weights(model, path, metadata, dtype)` writes the weights for others (default: all of them);
    `weight_path` is where; `frozen_base`: only parameters that require a gradient belong to the run, the
    others are read from --from_weight again when it is continued.
    """

    def __init__(self, stage, args, rt, tokenizer, path, train, val, frozen_base=False):
        self.stage, self.args, self.rt, self.tokenizer = stage, args, rt, tokenizer
        self.path, self.train, self.val = path, train, val
        self.frozen_base = frozen_base
        self.data = train.fingerprint()
        self.saved = self.parent = self.log = None
        self.save = None  # during `fit`: write everything as it is now
        self.other_bytes = 0  # of models beside the one that is trained, for the forecast of memory
        self.before_models = runtime.held_memory_gb(rt)
        self.save_weights = checkpoint.save_weights
        self.weight_path = checkpoint.weight_path

    def load(self, model):
        """Find what --from_resume 1 continues, or fill the model with --from_weight."""
        args, rt = self.args, self.rt
        self.saved = checkpoint.find_resume(
            args, model.config, self.tokenizer, self.data, len(self.train), rt
        )
        if self.saved is None or self.frozen_base:
            self.parent = checkpoint.load_from_weight(model, args, self.tokenizer, rt)
        if self.saved is not None:
            checkpoint.require_same_parent(self.saved, self.parent, self.frozen_base, args)
            self.parent = self.saved["run"]["parent"]
        checkpoint.note_length(model.config, self.train, args, self.saved is None and self.parent is None)
        longest = model.config.max_position_embeddings
        if args.max_seq_len > longest:
            rt.print(
                f"note: rows of {args.max_seq_len:,} tokens go beyond the {longest:,} positions of this model"
            )
        return model

    def prepare(self, model, dynamic=False):
        """(model as the loss must call it, optimizers). dynamic: batches differ in shape, so compiled code
        must fit any."""
        args, rt = self.args, self.rt
        seconds = batches.expected_seconds(model, args, rt, self.train)
        first = functools.partial(batches.first_micro_batch, self.train, args, rt)
        model, args.use_compile = runtime.maybe_compile(model, args.use_compile, rt, seconds, first, dynamic)
        model = runtime.wrap(model, rt)
        return model, cli.build_optimizers(model, args, rt)

    def fit(self, model, optimizers, update, validate, before=False, undo=None, **extra):
        """All steps: `update(step, micro_batches, lr_factor)` makes one and returns its line of the log,
        `validate(model)` the held-out metrics. before: validate first of all, so that the last lines can say
        what the stage changed. undo: how to take steps back that were only timed (default: weights and
        optimizers as they were). extra: goes into the resume file; what changes during the run is given as a
        function that is asked at every save."""
        args, rt = self.args, self.rt

        def make(step, micro_batches):
            rt.seed_step(step)
            factor = optim.lr_factor(step, batches.num_steps(len(self.train), args), **cli.schedule(args))
            return update(step, micro_batches, factor)

        if args.plan:
            from trainer import plan

            plan.show(self, model, optimizers, make, validate, before, undo, extra)
            return
        first = validate(model) if before and self.saved is None else {}
        made = []
        if args.max_minutes and not args.max_steps:
            undo = undo or runtime.snapshot(model, optimizers, rt)
            check = functools.partial(validate, model)
            args.max_steps, made = batches.steps_for_minutes(self.train, args, rt, make, undo, check)
        total_steps = batches.num_steps(len(self.train), args)
        about = checkpoint.describe(self.stage, args, self.tokenizer, self.data, total_steps, self.parent)
        written = self.weight_path(args, runtime.bare(model).config)
        progress.announce(args, rt, model, about, self.path, self.train, self.val, written, self.other_bytes)
        read = progress.describe_data(self.path, self.train) if rt.is_main else None
        log = self.log = progress.Progress(args, rt, model, about, read)
        log.start(checkpoint.restore(self.saved, model, optimizers, rt, log))
        log.log(**first)
        log.catch_up(made)

        def save():
            now = {name: value() if callable(value) else value for name, value in extra.items()}
            checkpoint.save(
                model, optimizers, args, rt, about, log, written, self.save_weights, self.frozen_base, **now
            )

        self.save = save
        for step, micro_batches in batches.training_steps(self.train, args, rt, log.done):
            log.step(step, **make(step, micro_batches))
            if log.due(args.val_interval):
                with log.aside():
                    log.log(**validate(model))
            if log.due(args.save_interval):
                with log.aside():
                    save()
        if log.done == log.total_steps:  # the run was not interrupted
            log.log(**validate(model))
        save()
        log.finish()

    def end(self, model, next_command: str):
        """The last lines, and the end of the process group."""
        if not self.args.plan:
            written = self.weight_path(self.args, runtime.bare(model).config)
            progress.farewell(self.args, self.rt, written, self.log, next_command)
        runtime.stop(self.rt)
