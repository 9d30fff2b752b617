"""What `scripts/bench.py` runs in a fresh process of its own: the peers' training loops, the one definition
of bits per byte, generation, data loading. A job is a JSON file and so is its result:

    python scripts/bench_contenders.py JOB.json RESULT.json

A MiniMind checkout is only ever reached by path. Its `model`, `dataset` and `trainer` folders carry the same
names as ours, so a process that trains or scores MiniMind imports nothing of ours; see `minimind_modules`.
"""

import importlib
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
SHARED_NAMES = ("model", "dataset", "trainer")  # packages of these names exist in both repositories
DENSE_FIELDS = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "vocab_size rms_norm_eps rope_theta max_position_embeddings tie_word_embeddings"
).split()
MOE_FIELDS = (
    "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob router_aux_loss_coef".split()
)


# --------------------------------------------------------------------------------------------------
# Bits per byte: one definition for everybody
# --------------------------------------------------------------------------------------------------


def split_segments(text: str, max_bytes: int = 700) -> list[str]:
    """Cut a text between characters into pieces of at most `max_bytes` UTF-8 bytes; joined they are the text.

    About 700 bytes fit into MiniMind's 340 tokens with either tokenizer, so nobody sees less of the text.
    """
    pieces, current, size = [], [], 0
    for character in text:
        width = len(character.encode("utf-8", errors="surrogatepass"))
        if size + width > max_bytes and current:
            pieces.append("".join(current))
            current, size = [], 0
        current.append(character)
        size += width
    if current:
        pieces.append("".join(current))
    return pieces


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Nats summed over all tokens of a text -> bits per UTF-8 byte of it, comparable between tokenizers."""
    return nats / math.log(2) / num_bytes


def segment_nats(logits_of, rows: list[list[int]], pad_id: int = 0, batch_rows: int = 16) -> list[float]:
    """Negative log-likelihood of each row's tokens after the first (the bos prefix), in nats, float32.

    `logits_of(ids (B, T) int64) -> (B, T, V)`; rows are padded on the right, out of a causal model's sight.
    """
    import torch
    import torch.nn.functional as F

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: little padding
    nats = [0.0] * len(rows)
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        length = max(len(rows[i]) for i in chosen)
        ids = torch.full((len(chosen), length), pad_id)
        targets = torch.full((len(chosen), length), -100)
        for k, i in enumerate(chosen):
            ids[k, : len(rows[i])] = torch.tensor(rows[i])
            targets[k, 1 : len(rows[i])] = torch.tensor(rows[i][1:])
        with torch.no_grad():
            logits = logits_of(ids)[:, :-1].float().cpu()
        losses = F.cross_entropy(logits.transpose(1, 2), targets[:, 1:], ignore_index=-100, reduction="none")
        for k, i in enumerate(chosen):
            nats[i] = losses[k].sum().item()
    return nats


def validation_segments(val_path, max_bytes: int = 700, total_bytes: int = 400_000, seed: int = 0):
    """(segments, is_first): held-out documents cut by `split_segments`, a fixed random choice of about
    `total_bytes`. `is_first` marks the beginning of a document: MiniMind trains on beginnings only, so the
    score on those is reported too."""
    import random

    pool = []
    with Path(val_path).open(encoding="utf-8") as lines:
        for line in lines:
            pieces = split_segments(json.loads(line)["text"], max_bytes)
            pool += [(piece, i == 0) for i, piece in enumerate(pieces)]
    random.Random(seed).shuffle(pool)
    chosen, size = [], 0
    for piece, is_first in pool:
        if size >= total_bytes:
            break
        chosen.append((piece, is_first))
        size += len(piece.encode())
    return [piece for piece, _ in chosen], [is_first for _, is_first in chosen]


def token_bytes(tokenizer) -> list[int]:
    """UTF-8 bytes of each token: a byte-level BPE spells every byte as one character. Special tokens: 0."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [0 if i in special or word is None else len(word) for i, word in enumerate(words)]


# --------------------------------------------------------------------------------------------------
# Who is who
# --------------------------------------------------------------------------------------------------


def minimind_modules(root, restore: bool = False) -> SimpleNamespace:
    """The modules of a MiniMind checkout as they ship: `.model`, `.dataset`, `.utils`.

    restore=True puts our own packages of the same names back afterwards, for a process that needs both.
    """
    root = Path(root).resolve()
    if not (root / "model" / "model_minimind.py").is_file():
        raise SystemExit(
            f"{root} is not a MiniMind checkout: it has no model/model_minimind.py. Clone "
            "https://github.com/jingyaogong/minimind and pass its folder to --minimind"
        )

    def take_out():
        names = [n for n in sys.modules if n.split(".")[0] in SHARED_NAMES]
        return {name: sys.modules.pop(name) for name in names}

    ours, path = take_out(), list(sys.path)
    sys.path[:] = [str(root)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    try:
        found = SimpleNamespace(
            model=importlib.import_module("model.model_minimind"),
            dataset=importlib.import_module("dataset.lm_dataset"),
            utils=importlib.import_module("trainer.trainer_utils"),
            root=root,
        )
    finally:
        if restore:
            take_out()
            sys.modules.update(ours)
            sys.path[:] = path
    import datasets

    datasets.disable_progress_bars()
    return found


def add_our_root():
    sys.path.insert(0, str(ROOT))


def minimind_model(modules, shape: dict):
    """MiniMind's class with our shape, as far as its configuration has the field (it always has QK-norm)."""
    fields = [*DENSE_FIELDS, *MOE_FIELDS, "use_moe"]
    return modules.model.MiniMindForCausalLM(modules.model.MiniMindConfig(**{f: shape[f] for f in fields}))


def transformers_model(shape: dict, family: str = "qwen3"):
    """transformers' own model of that shape, with its own initialisation and SDPA attention."""
    import transformers

    common = {f: shape[f] for f in DENSE_FIELDS} | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common["rope_parameters"] = {"rope_type": "default", "rope_theta": common.pop("rope_theta")}
    if shape["use_moe"]:
        if shape["n_shared_experts"]:
            raise SystemExit(
                "transformers' Qwen3-MoE has no shared experts: leave 'transformers' out of --contenders"
            )
        config = transformers.Qwen3MoeConfig(
            **common, **{f: shape[f] for f in MOE_FIELDS}, output_router_logits=True
        )
        return transformers.Qwen3MoeForCausalLM(config)
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common))


def our_model(shape: dict):
    from model.model_minimind import MiniMindConfig, MiniMindLM

    return MiniMindLM(MiniMindConfig(**shape))


# --------------------------------------------------------------------------------------------------
# Training the peers
# --------------------------------------------------------------------------------------------------


def job_train(job: dict) -> dict:
    """Train a peer for `seconds`, counted from its first step: imports, model and data set cost nothing.
    The learning rate follows its cosine over exactly that time, so the run is complete on any machine."""
    import torch

    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    on_cuda = device.type == "cuda"
    peer = minimind_peer(job) if job["contender"].startswith("minimind") else transformers_peer(job)
    model = peer.model.to(device).train()
    runner = torch.compile(model) if job["compile"] else model
    autocast = nullcontext()
    if job["autocast"]:
        autocast = torch.autocast(device.type, torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job["learning_rate"], fused=True if on_cuda else None
    )
    widths = torch.tensor(peer.token_bytes)
    accumulation, seconds = job["accumulation"], job["seconds"]
    wait = torch.cuda.synchronize if on_cuda else (lambda: None)

    def forward_backward(batch):
        with autocast:
            loss = peer.loss(runner, {k: v.to(device, non_blocking=True) for k, v in batch.items()})
        (loss / accumulation).backward()
        return loss

    batches = endless(peer.loader)
    compile_started = time.perf_counter()
    if job["compile"]:  # in the peer's favour: compiling is outside its budget
        forward_backward(next(batches))
        optimizer.zero_grad(set_to_none=True)
        wait()
    compile_seconds = time.perf_counter() - compile_started
    first = next(batches)  # so are the workers' start and the first batch

    clock = time.perf_counter
    if job["clock"] == "cpu":
        clock = lambda: time.process_time() / job["threads"]  # noqa: E731
    startup_seconds = time.monotonic() - STARTED
    cpu_started, wall_started, started = time.process_time(), time.perf_counter(), clock()
    micro_steps = updates = tokens = slots = num_bytes = 0
    update_seconds, last_update, losses = [], time.perf_counter(), []
    batch = first
    while True:
        elapsed = clock() - started
        if micro_steps % accumulation == 0 and (
            elapsed >= seconds or updates >= job.get("max_updates", 10**12)
        ):
            break
        lr = peer.learning_rate(min(elapsed, seconds), seconds, job["learning_rate"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        targets = batch["labels"][:, 1:]
        valid = targets[targets != -100]
        tokens, slots = tokens + len(valid), slots + targets.numel()
        num_bytes += int(widths[valid].sum())
        loss = forward_backward(batch)
        micro_steps += 1
        if micro_steps % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            updates += 1
            if (
                not on_cuda or updates % 10 == 0
            ):  # a queue of kernels must not run ahead of the clock for long
                losses.append(loss.item())
                now = time.perf_counter()
                update_seconds.append((now - last_update) / (1 if not on_cuda else 10))
                last_update = now
        batch = next(batches)
    wait()
    result = dict(
        train_seconds=time.perf_counter() - wall_started,
        train_cpu_seconds=time.process_time() - cpu_started,
        startup_seconds=startup_seconds - compile_seconds,
        compile_seconds=compile_seconds if job["compile"] else 0.0,
        updates=updates,
        tokens=tokens,
        slots=slots,
        bytes=num_bytes,
        step_seconds=median(update_seconds),
        last_loss=sum(losses[-10:]) / max(1, len(losses[-10:])),
        parameters=sum(p.numel() for p in model.parameters()),
        cuda_peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
    )
    if job.get("weights"):
        torch.save({k: v.float().cpu() for k, v in model.state_dict().items()}, job["weights"])
    return result


def endless(loader):
    while True:
        yield from loader


def median(values):
    values = sorted(values)
    return values[len(values) // 2] if values else float("nan")


def minimind_peer(job):
    """MiniMind's model, data set class (one padded document per row), loss and learning-rate formula."""
    import torch
    from transformers import AutoTokenizer

    modules = minimind_modules(job["minimind"])
    modules.utils.setup_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(str(modules.root / "model"))
    dataset = modules.dataset.PretrainDataset(job["train_path"], tokenizer, max_length=job["max_seq_len"])

    def collate(rows):
        return {
            "input_ids": torch.stack([row[0] for row in rows]),
            "labels": torch.stack([row[1] for row in rows]),
        }

    def loss(model, batch):
        out = model(batch["input_ids"], labels=batch["labels"])
        return out.loss + out.aux_loss

    return SimpleNamespace(
        model=minimind_model(modules, job["shape"]),
        loader=data_loader(dataset, collate, job),
        loss=loss,
        learning_rate=modules.utils.get_lr,
        token_bytes=token_bytes(tokenizer),
    )


def transformers_peer(job):
    """The usual loop around transformers' Qwen3: rows truncated at max_seq_len, padded to the longest of the
    batch, attention mask, cosine to a tenth."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    texts = [json.loads(line)["text"] for line in Path(job["train_path"]).open(encoding="utf-8")]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id

    def collate(rows):
        body = tokenizer(rows, add_special_tokens=False, truncation=True, max_length=job["max_seq_len"] - 2)
        ids = [[bos, *row, eos] for row in body["input_ids"]]
        length = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]),
            "labels": torch.tensor([row + [-100] * (length - len(row)) for row in ids]),
        }

    def learning_rate(now, end, peak):
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * now / end)))

    return SimpleNamespace(
        model=transformers_model(job["shape"]),
        loader=data_loader(texts, collate, job),
        loss=lambda model, batch: model(**batch, use_cache=False).loss,
        learning_rate=learning_rate,
        token_bytes=token_bytes(tokenizer),
    )


def data_loader(dataset, collate, job):
    import torch

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=job["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=job["workers"],
        collate_fn=collate,
        pin_memory=job["device"] == "cuda",
        persistent_workers=job["workers"] > 0,
        generator=torch.Generator().manual_seed(job["seed"]),
    )


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------


def job_evaluate(job: dict) -> dict:
    """Bits per byte of saved weights on the held-out segments, in float32: each segment after a bos token,
    summed over its tokens, no eos."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(job["threads"])
    weights = torch.load(job["weights"], map_location="cpu", weights_only=True)
    if job["contender"].startswith("minimind"):
        modules = minimind_modules(job["minimind"])
        model = minimind_model(modules, job["shape"])
        tokenizer = AutoTokenizer.from_pretrained(str(modules.root / "model"))
    else:
        if job["contender"] == "ours":
            add_our_root()
            model = our_model(job["shape"])
        else:
            model = transformers_model(job["shape"])
        tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    load_weights(model, weights)
    device = torch.device(job["device"])
    model.to(device).eval()

    segments, is_first = validation_segments(job["val_path"], total_bytes=job["val_bytes"])
    encoded = tokenizer(segments, add_special_tokens=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *ids] for ids in encoded]
    nats = segment_nats(lambda ids: model(ids.to(device)).logits, rows, tokenizer.pad_token_id)
    sizes = [len(s.encode()) for s in segments]

    def score(wanted):
        chosen = [i for i, first in enumerate(is_first) if wanted is None or first == wanted]
        num_bytes = sum(sizes[i] for i in chosen)
        return bits_per_byte(sum(nats[i] for i in chosen), num_bytes) if num_bytes else None

    return dict(
        bpb=score(None),
        bpb_document_starts=score(True),
        bpb_later=score(False),
        val_segments=len(segments),
        val_bytes=sum(sizes),
        val_tokens=sum(len(row) - 1 for row in rows),
        longest_segment_tokens=max(map(len, rows)),
    )


def load_weights(model, weights: dict):
    """Strict, apart from a tied head that is stored or not, and our metadata entry."""
    names = set(model.state_dict())
    weights = {k: v for k, v in weights.items() if k in names or hasattr(v, "shape")}
    for name in names - set(weights):
        if name == "lm_head.weight":
            weights[name] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)


def job_describe(job: dict) -> dict:
    """The shape all contenders share, as fields of our configuration, and what this machine can do."""
    import platform

    import torch
    import transformers

    add_our_root()
    from model.model_minimind import (
        PRESETS,
        MiniMindConfig,
        MiniMindForCausalLM,
        count_parameters,
        flops_per_token,
    )
    from trainer import runtime

    torch.set_num_threads(job["threads"])
    if job["preset"] and job["preset"] not in PRESETS:
        raise SystemExit(f"unknown preset {job['preset']!r}; choose one of {', '.join(PRESETS)}")
    config = MiniMindConfig(**((PRESETS[job["preset"]] if job["preset"] else {}) | job["overrides"]))
    fields = [name for name in MiniMindConfig.__init__.__annotations__ if hasattr(config, name)]
    shape = {name: getattr(config, name) for name in fields if name not in ("rope_parameters", "return")}
    with torch.device("meta"):
        total, active = count_parameters(MiniMindForCausalLM(config))
    device = torch.device(job["device"])
    best = runtime.choose_dtype("auto", device)
    ours = runtime.choose_dtype("auto", device, config.hidden_size)
    peaks = {}
    for dtype in dict.fromkeys((torch.float32, best)):
        name = str(dtype).removeprefix("torch.")
        peaks[name] = runtime.peak_flops(runtime.Runtime(device, dtype, seed=0)) or best_product(
            device, dtype
        )
    if device.type == "cuda":
        name, capability = (
            torch.cuda.get_device_name(device),
            "sm_" + "".join(map(str, torch.cuda.get_device_capability(device))),
        )
    else:
        name, capability = cpu_name(), cpu_capability(torch)
    machine = dict(
        name=name,
        capability=capability,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        dtype=str(best).removeprefix("torch."),
        our_dtype=str(ours).removeprefix("torch."),
        peaks=peaks,
        parameters=total,
        flops_per_token=flops_per_token(config, job["max_seq_len"], active),
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
    )
    return dict(shape=shape, machine=machine)


def best_product(device, dtype) -> float:
    """FLOP/s of the fastest of a few large products: for a GPU whose data sheet is not at hand."""
    import torch

    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    fastest = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * 8192**3 / fastest


def cpu_name() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_capability(torch) -> str:
    """The best of what torch's matrix products can use."""
    add_our_root()
    from model.precision import cpu_features

    known = cpu_features()
    for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2", "neon"):
        if known.get(name):
            return name
    return "-"


# --------------------------------------------------------------------------------------------------
# Generation
# --------------------------------------------------------------------------------------------------


def random_weights(model, seed: int):
    """Weights under which greedy decoding wanders instead of repeating one token: matrices that keep the size
    of what they multiply, random norms, and random signs in the last one, so that the tied head does not
    simply return its input."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
        signs = torch.randint(0, 2, model.model.norm.weight.shape, generator=generator) * 2 - 1
        model.model.norm.weight.mul_(signs)


def products_alone(engine, rows: int, steps: int) -> float:
    """Seconds that the matrix products of `steps` steps take our engine with nothing between them (int8:
    rounding the inputs included)."""
    import torch

    products = [(engine.head, engine.config.hidden_size)]
    for layer in engine.layers:
        products += [(layer.qkv, engine.config.hidden_size), (layer.out, engine.R * engine.K * engine.hd)]
        products += [(layer.mlp.gate_up, engine.config.hidden_size)]
        products += [(layer.mlp.down, engine.config.intermediate_size)]
    inputs = [torch.randn(rows, width).to(engine.device, engine.dtype) for _, width in products]
    wait = torch.cuda.synchronize if engine.device.type == "cuda" else (lambda: None)
    with torch.inference_mode():
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            for (linear, _), x in zip(products, inputs):
                linear(x)
        wait()
    return time.perf_counter() - started


def job_generate(job: dict) -> dict:
    """Tokens per second of each engine on the same weights and prompts, engines in turn within every repeat;
    and whether ours and transformers chose the same tokens in float32."""
    import torch

    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    add_our_root()
    from model.generation import Generator
    from trainer.checkpoint import METADATA

    shape = job["shape"] | {"residual_init": "normal"}
    ours = our_model(shape)
    if job["weights"]:
        stored = torch.load(job["weights"], map_location="cpu", weights_only=True)
        load_weights(ours, {k: v for k, v in stored.items() if k != METADATA})
    else:
        random_weights(ours, job["seed"])
    ours.to(device).eval()
    state = {k: v for k, v in ours.state_dict().items() if k != "lm_head.weight"}
    N = job["new_tokens"]

    def our_engine(dtype, compile=False):
        engine = Generator(ours, dtype=dtype, compile=compile)
        generators[f"{dtype} compiled" if engine.compiled else dtype] = engine
        return lambda prompts: [
            c.ids for c in engine.generate(prompts, max_new_tokens=N, temperature=0, ignore_eos=True)
        ]

    def transformers_engine(dtype):
        model = transformers_model(shape, "qwen3" if shape["qk_norm"] else "llama")
        load_weights(model, state)
        model.to(device=device, dtype=dtype).eval()
        model.generation_config.eos_token_id = None  # nobody stops early

        def generate(prompts):
            ids = torch.tensor(prompts, device=device)
            mask = torch.ones_like(ids)
            settings = dict(max_new_tokens=N, do_sample=False, use_cache=True, pad_token_id=0)
            with torch.inference_mode():
                return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()

        return generate

    def minimind_engine(dtype):
        modules = minimind_modules(job["minimind"], restore=True)
        model = minimind_model(modules, shape)
        if not shape["qk_norm"]:  # MiniMind always normalises heads: the work is the same, the tokens are not
            state.update({k: v for k, v in model.state_dict().items() if "q_norm" in k or "k_norm" in k})
        load_weights(model, state)
        model.to(device=device, dtype=dtype).eval()

        def generate(prompts):
            ids = torch.tensor(prompts, device=device)
            settings = dict(max_new_tokens=N, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)
            return model.generate(ids, eos_token_id=None, **settings)[:, ids.shape[1] :].tolist()

        return generate

    engines, generators = {}, {}
    for dtype in job["dtypes"]:
        if dtype != "int8":
            engines[f"transformers {dtype}"] = transformers_engine(getattr(torch, dtype))
            if job["minimind"]:
                engines[f"MiniMind {dtype}"] = minimind_engine(getattr(torch, dtype))
        engines[f"ours {dtype}"] = our_engine(dtype)
        if job["compile"] and generators[dtype].can_compile:
            print("compiling our engine; the first time on a machine takes about a minute", flush=True)
            compiled = our_engine(dtype, compile=True)  # warns, if it cannot
            if f"{dtype} compiled" in generators:
                engines[f"ours {dtype} compiled"] = compiled

    generator = torch.Generator().manual_seed(job["seed"])
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    results, identical, different_tokens = [], True, []
    for batch in job["batches"]:
        low, high = 36, shape["vocab_size"]
        prompts = torch.randint(low, high, (batch, job["prompt_tokens"]), generator=generator).tolist()
        seconds = {name: [] for name in engines}
        for repeat in range(-1, job["repeats"]):
            outputs = {}
            for name, engine in engines.items():
                if repeat < 0 and batch == job["batches"][0]:
                    engine(prompts[:1])  # warm up: first calls allocate and look things up
                if repeat < 0:
                    continue
                wait()
                started = time.perf_counter()
                outputs[name] = engine(prompts)
                wait()
                seconds[name].append(time.perf_counter() - started)
            if repeat == 0:
                float32 = [found for name, found in outputs.items() if name.startswith("ours float32")]
                identical = identical and all(found == outputs["transformers float32"] for found in float32)
                different_tokens.append(len({t for row in outputs["ours float32"] for t in row}))
                lengths = {len(row) for rows in outputs.values() for row in rows}
                if lengths != {N}:
                    raise SystemExit(f"an engine made {sorted(lengths)} tokens per row instead of {N}")
        results += [
            dict(batch=batch, engine=name, seconds=times, tokens_per_second=batch * N / median(times))
            for name, times in seconds.items()
        ]
        for dtype, engine in generators.items():
            if shape["use_moe"] or engine.compiled:
                continue
            times = [products_alone(engine, batch, N) for _ in range(job["repeats"])]
            speed = batch * N / median(times)
            alone = dict(engine=f"(products alone) {dtype}", seconds=times, tokens_per_second=speed)
            results.append(dict(batch=batch, **alone))
    return dict(results=results, identical=identical, different_tokens=different_tokens)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def job_our_data(job: dict) -> dict:
    """Build (or open) the token cache, then hand out random batches for a while."""
    import random

    from transformers import AutoTokenizer

    add_our_root()
    from dataset.lm_dataset import load_pretrain

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    started, cpu = time.perf_counter(), time.process_time()
    rows, _ = load_pretrain(
        job["train_path"],
        tokenizer,
        job["max_seq_len"],
        cache_dir=job.get("cache_dir"),
        num_workers=job["threads"],
    )
    seconds = time.perf_counter() - started
    result = rows.report() | dict(
        start_seconds=seconds,
        start_cpu_seconds=time.process_time() - cpu,
        num_bytes=rows.num_bytes,
        num_tokens=rows.num_tokens,
        num_targets=rows.num_targets,
    )
    if job.get("seconds"):
        order, batches, targets = list(range(len(rows))), 0, 0
        random.Random(job["seed"]).shuffle(order)
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < job["seconds"]:
            chosen = [order[(batches * job["batch_size"] + i) % len(order)] for i in range(job["batch_size"])]
            targets += int((rows.batch(chosen)["labels"][:, 1:] != -100).sum())
            batches += 1
        result.update(batches_per_second=batches / elapsed, tokens_per_second=targets / elapsed)
    return result


def job_minimind_data(job: dict) -> dict:
    """MiniMind's data set class behind a DataLoader that tokenizes on the fly, as its stages do."""
    import torch
    from transformers import AutoTokenizer

    modules = minimind_modules(job["minimind"])
    tokenizer = AutoTokenizer.from_pretrained(str(modules.root / "model"))
    widths = torch.tensor(token_bytes(tokenizer))
    started = time.perf_counter()
    dataset = modules.dataset.PretrainDataset(job["train_path"], tokenizer, max_length=job["max_seq_len"])
    loader = endless(data_loader(dataset, None, job | {"workers": job["threads"]}))
    next(loader)
    start_seconds = time.perf_counter() - started
    batches = tokens = slots = num_bytes = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < job["seconds"]:
        _, labels = next(loader)
        targets = labels[:, 1:]
        valid = targets[targets != -100]
        batches, tokens, slots = batches + 1, tokens + len(valid), slots + targets.numel()
        num_bytes += int(widths[valid].sum())
    return dict(
        start_seconds=start_seconds,
        batches_per_second=batches / elapsed,
        tokens_per_second=tokens / elapsed,
        bytes_per_second=num_bytes / elapsed,
        padding_percent=100 * (1 - tokens / slots),
    )


# --------------------------------------------------------------------------------------------------


JOBS = {
    "describe": job_describe,
    "train": job_train,
    "evaluate": job_evaluate,
    "generate": job_generate,
    "our_data": job_our_data,
    "minimind_data": job_minimind_data,
}


def main(argv=None):
    job_path, result_path = (argv or sys.argv[1:])[:2]
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    result = JOBS[job["kind"]](job)
    result["process_seconds"] = time.monotonic() - STARTED
    temporary = Path(result_path).with_suffix(".part")
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.replace(result_path)


if __name__ == "__main__":
    main()
