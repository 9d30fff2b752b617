"""Draw the figures of docs/training.md: what the denominator does to a gradient, and the schedules.

    python docs/figures/training_step.py

Writes denominator.svg and schedules.svg beside itself; deterministic, seconds on a CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

HERE = Path(__file__).resolve().parent
SPREADS = {
    "equal": (31, 31, 31, 30),
    "mild": (45, 36, 26, 16),
    "chat": (60, 50, 10, 3),
    "extreme": (118, 3, 1, 1),
}


def gradient(model, batches, denominators):
    """Gradient of the sum over micro-batches of summed cross-entropy / denominator, as one vector."""
    import torch

    model.zero_grad()
    for batch, denominator in zip(batches, denominators):
        (model(**batch, num_items_in_batch=1).loss / denominator).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def cosines():
    """For each spread of label counts over four micro-batches: cosine between the gradient of the one large
    batch and (a) sums divided by the step's count, (b) the mean of the micro-batches' means."""
    import torch

    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, residual_init="normal")
    model = MiniMindForCausalLM(MiniMindConfig(**shape))
    result = {}
    for name, counts in SPREADS.items():
        ids = torch.randint(40, 6400, (4, 128))
        labels = torch.full_like(ids, -100)
        for row, count in enumerate(counts):
            labels[row, 1 : 1 + count] = ids[row, 1 : 1 + count]
        total = sum(counts)
        together = gradient(model, [{"input_ids": ids, "labels": labels}], [total])
        rows = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(4)]
        candidates = gradient(model, rows, [total] * 4), gradient(model, rows, [4 * n for n in counts])
        result[name] = [torch.cosine_similarity(together, g, dim=0).item() for g in candidates]
    return result


def main():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "training", "svg.fonttype": "none"})
    from matplotlib.figure import Figure

    from trainer.optim import lr_factor

    found = cosines()
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    at = range(len(found))
    axes.bar([x - 0.2 for x in at], [ours for ours, _ in found.values()], 0.38, label="sums / count")
    axes.bar([x + 0.2 for x in at], [theirs for _, theirs in found.values()], 0.38, label="mean of means")
    axes.set_xticks(list(at), [f"{name}\n{' '.join(map(str, SPREADS[name]))}" for name in found])
    axes.set(
        xlabel="targets in each of four micro-batches", ylabel="cosine to the large batch", ylim=(0, 1.05)
    )
    axes.legend(loc="lower left")
    figure.savefig(HERE / "denominator.svg", metadata={"Date": None})
    for name, (ours, theirs) in found.items():
        print(f"{name:8} targets {SPREADS[name]}: sums/count {ours:.6f}, mean of means {theirs:.3f}")

    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    for schedule in ("wsd", "cosine", "linear", "constant"):
        factors = [lr_factor(step, 1000, schedule, warmup_steps=50) for step in range(1000)]
        axes.plot(factors, label=schedule)
    axes.set(xlabel="optimizer step (50 of 1000 warm up)", ylabel="share of the peak rate", ylim=(0, 1.05))
    axes.legend()
    figure.savefig(HERE / "schedules.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
