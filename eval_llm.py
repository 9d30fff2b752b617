"""Talk to a model.

    python eval_llm.py                                     # the newest out/full_sft_*.pth, in the terminal
    python eval_llm.py --weight pretrain --prompt "The sky is"
    python eval_llm.py --lora_weight lora_identity         # with an adapter of out/lora
    echo "你好" | python eval_llm.py --weight dpo          # one prompt per line, nothing is asked; a pipe
                                                           # with nothing in it gets the fixed prompts
    python eval_llm.py --load_from path/to/folder          # a transformers folder (with config.json)

The architecture comes from the weight file. Weights named pretrain* continue raw text, all others answer in
the chat format. In the terminal: /exit, an empty line, Ctrl-D or Ctrl-C end the talk; Ctrl-C during an answer
ends the answer.
"""

import argparse
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

from trainer import cli

CHAT_PROMPTS = (
    "你好，请介绍一下你自己。",
    "为什么秋天树叶会变黄？",
    "给我三条保持健康的小建议。",
    "12 加 30 等于多少？",
    "Hello, who are you?",
    "Why does ice float on water?",
    "Write a short poem about the sea.",
    "What is 7 plus 8?",
)
TEXT_PROMPTS = (
    "中国的首都是",
    "春天来了，",
    "水在零度的时候",
    "从前有一座山，",
    "The capital of France is",
    "Once upon a time",
    "The sun rises in the",
    "To make bread you need",
)
OLD_MODES = ("pretrain", "full_sft", "dpo", "reason", "ppo_actor", "grpo")  # --model_mode of 2025


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"{Path(self.prog).name}: {message} (--help lists all flags)", file=sys.stderr)
        raise SystemExit(2)


def add_weight_flags(g, many: bool = False):
    """The flags by which `find_weights` finds a file. many: a server takes several."""
    more = "; several, separated by commas, are served under their names" if many else ""
    g.add_argument(
        "--weight",
        default="full_sft",
        metavar="NAME",
        help="name of the stage that wrote the weights: pretrain, full_sft, dpo, reason, grpo, "
        "...; or a .pth file" + more,
    )
    g.add_argument(
        "--hidden_size",
        type=cli.positive_int,
        metavar="N",
        help="width in the file name; without it: the newest file of that name",
    )
    g.add_argument(
        "--use_moe",
        type=cli.switch,
        metavar="0|1",
        help="1 = the _moe file, 0 = the dense one; without it: whichever is there",
    )
    g.add_argument(
        "--preset",
        choices=cli.PRESETS,
        metavar="NAME",
        help=f"width and kind of a known architecture: {', '.join(cli.PRESETS)}",
    )
    g.add_argument(
        "--save_dir",
        "--out_dir",
        type=Path,
        default=ROOT / "out",
        metavar="DIR",
        help="folder of the weights",
    )


def add_position_flags(g):
    g.add_argument(
        "--inference_rope_scaling",
        nargs="?",
        type=cli.switch,
        const=1,
        default=0,
        metavar="0|1",
        help="1 = YaRN: stretch the positions of the length that the weights say they were trained at",
    )
    g.add_argument(
        "--yarn_factor",
        type=cli.number_type(float, above=1, high=1024),
        metavar="X",
        help="how far it stretches them; without it 16",
    )


def position_overrides(args) -> dict:
    """What these flags mean to `checkpoint.load_model`. Raises CheckpointError."""
    if args.yarn_factor and not args.inference_rope_scaling:
        from trainer.checkpoint import CheckpointError

        raise CheckpointError("--yarn_factor stretches nothing without --inference_rope_scaling 1")
    factor = {"yarn_factor": args.yarn_factor} if args.yarn_factor else {}
    return {"inference_rope_scaling": True, **factor} if args.inference_rope_scaling else {}


def add_model_flags(parser, many: bool = False):
    """The flags that say which weights to load and how. many: a server takes several."""
    g = parser.add_argument_group("which model")
    add_weight_flags(g, many)
    g.add_argument(
        "--num_hidden_layers",
        type=cli.positive_int,
        metavar="N",
        help="number of blocks the file must have; without it: whatever it has",
    )
    g.add_argument(
        "--load_from",
        type=Path,
        default=ROOT / "model",
        metavar="DIR",
        help="a folder with config.json is a transformers model; any other is the tokenizer that "
        "goes with --weight",
    )
    g.add_argument(
        "--lora_weight",
        "--lora_name",
        default="None",
        metavar="NAMES",
        help="adapters of out/lora, each served as WEIGHT:ADAPTER beside the weights themselves"
        if many
        else "adapters of out/lora to add: lora_identity, or lora_a:0.5,lora_b for half of one and all of "
        "another",
    )
    add_position_flags(g)
    g.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    g.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
        help="auto = bfloat16 where this machine multiplies it faster, else int8 on CPUs with VNNI (models "
        "at least 256 wide), else float32 (float16 on CUDA); int8 = 8-bit weights and products: less "
        "exact, no faster without VNNI, not for transformers folders",
    )
    g.add_argument(
        "--use_compile",
        type=cli.switch,
        default=0,
        metavar="0|1",
        help="1 = compile a dense model on a CPU, in int8 or float32: up to twice as fast; takes a minute "
        "the first time, and a C++ compiler",
    )


def parse_args(argv=None):
    parser = Parser(
        description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False, usage="%(prog)s [flags]"
    )
    add_model_flags(parser)
    g = parser.add_argument_group("what to ask")
    g.add_argument(
        "--prompt", action="append", metavar="TEXT", help="ask this and end; may be given several times"
    )
    g.add_argument("--auto", action="store_true", help="ask the eight fixed prompts and end")
    g.add_argument(
        "--historys",
        "--history_cnt",
        type=cli.count,
        default=0,
        metavar="N",
        help="past messages the model sees (questions and answers each count; an even number)",
    )
    g.add_argument(
        "--open_thinking",
        type=cli.switch,
        default=0,
        metavar="0|1",
        help="1 = the answer begins with thoughts",
    )
    g.add_argument(
        "--show_speed",
        type=cli.switch,
        default=1,
        metavar="0|1",
        help="print tokens per second, reading the prompt included",
    )

    g = parser.add_argument_group("how to answer")
    g.add_argument(
        "--max_new_tokens",
        "--max_seq_len",
        type=cli.positive_int,
        default=8192,
        metavar="N",
        help="longest answer in tokens",
    )
    g.add_argument(
        "--temperature",
        type=cli.non_negative_float,
        default=0.85,
        metavar="X",
        help="0 = always the likeliest token, larger = more random",
    )
    g.add_argument(
        "--top_p",
        type=cli.number_type(float, above=0, high=1),
        default=0.95,
        metavar="X",
        help="draw from the likeliest tokens that together reach this probability, 1 = from all",
    )
    g.add_argument(
        "--top_k",
        type=cli.count,
        default=0,
        metavar="N",
        help="draw from the N likeliest tokens, 0 = from all",
    )
    g.add_argument(
        "--min_p",
        type=cli.fraction,
        default=0.0,
        metavar="X",
        help="draw from tokens at least X times as likely as the likeliest, 0 = from all",
    )
    g.add_argument(
        "--repetition_penalty",
        type=cli.positive_float,
        default=1.0,
        metavar="X",
        help="above 1 makes tokens seen before less likely, 1 = off",
    )
    g.add_argument(
        "--seed", type=cli.count, metavar="N", help="repeat the same answers; without it every run differs"
    )

    g = parser.add_argument_group("names of 2025")
    g.add_argument(
        "--model_mode",
        type=int,
        choices=range(len(OLD_MODES)),
        metavar="0..5",
        help=f"the same as --weight {', '.join(OLD_MODES)}",
    )
    g.add_argument(
        "--load", type=cli.switch, default=0, metavar="0|1", help="1 = the same as --load_from MiniMind2"
    )

    args = parser.parse_args(argv)
    if args.model_mode is not None:
        args.weight = OLD_MODES[args.model_mode]
    if args.load and args.load_from == ROOT / "model":
        args.load_from = Path("MiniMind2")
    if args.prompt and not all(p.strip() for p in args.prompt):
        parser.error("--prompt is empty")
    return args


# ------------------------------------------------------------------------------------------------------------
# Finding and loading
# ------------------------------------------------------------------------------------------------------------


def find_weights(args) -> Path:
    """The file of --weight: named by its width, or the newest of that name. Raises CheckpointError."""
    from trainer.checkpoint import CheckpointError, shown

    if args.weight.endswith(".pth"):
        path = Path(args.weight)
        if not path.exists():
            raise CheckpointError(f"{shown(path)} does not exist")
        return path
    hidden_size, use_moe = args.hidden_size, args.use_moe
    if args.preset:
        from model.model_minimind import MiniMindConfig

        config = MiniMindConfig.from_preset(args.preset)
        hidden_size = hidden_size or config.hidden_size
        use_moe = config.use_moe if use_moe is None else use_moe
    pattern = re.compile(re.escape(args.weight) + r"_(\d+)(_moe)?\.pth")
    files = sorted(args.save_dir.glob("*.pth"), key=lambda p: p.stat().st_mtime, reverse=True)
    matches = [(path, m) for path in files if (m := pattern.fullmatch(path.name))]
    fitting = [
        path
        for path, m in matches
        if hidden_size in (None, int(m[1])) and (use_moe is None or bool(use_moe) == bool(m[2]))
    ]
    if fitting:
        if len(fitting) > 1:
            others = ", ".join(p.name for p in fitting[1:4])
            say(f"several files fit: taking the newest, {fitting[0].name}, not {others} (see --hidden_size)")
        return fitting[0]
    wanted = f"{args.weight}_{hidden_size or '*'}{'_moe' if use_moe else ''}.pth"
    there = ", ".join(p.name for p in ([p for p, _ in matches] or files)[:6])
    script = f"trainer/train_{args.weight}.py"
    remedy = f"run {script} first" if (ROOT / script).exists() else "train it first"
    hint = (
        f"There is {there}: choose with --weight and --hidden_size"
        if there
        else f"Nothing is there: {remedy}"
    )
    raise CheckpointError(f"{shown(args.save_dir / wanted)} does not exist. {hint}")


def has_adapters(args) -> bool:
    return args.lora_weight not in ("None", "none", "")


class Native:
    """A model of this project's architecture, from a weight file or a transformers folder, with the fast
    engine."""

    def __init__(self, args):
        from model.generation import Generator
        from model.model_minimind import count_parameters
        from trainer import checkpoint, runtime

        device = runtime.choose_device(args.device)
        self.tokenizer = load_tokenizer(args.load_from)
        overrides = {"num_hidden_layers": args.num_hidden_layers} if args.num_hidden_layers else {}
        overrides |= position_overrides(args)
        if is_folder(args.load_from):
            refuse_for_folder({f"--lora_weight {args.lora_weight}": has_adapters(args)})
            path, metadata = args.load_from, {}
            model = load_folder(args.load_from, self.tokenizer, overrides)
        else:
            path = find_weights(args)
            model, metadata = checkpoint.load_model(path, self.tokenizer, **overrides)
        self.path, self.metadata = path, metadata
        # MiniMind's file names tell the stage, ours tell it themselves
        self.is_base = path.name.startswith("pretrain") or metadata.get("stage") == "pretrain"
        if has_adapters(args):
            for note in checkpoint.merge_adapters(model, args.lora_weight, path.parent, metadata):
                say(note)
            say(f"with {args.lora_weight}")
        if args.use_compile:
            say("compiling, if it can be; the first time that takes about a minute")
        self.engine = Generator(model.to(device), args.dtype, compile=bool(args.use_compile))
        dtype = "int8" if self.engine.int8 else str(self.engine.dtype).removeprefix("torch.")
        million = count_parameters(model)[0] / 1e6
        say(f"{checkpoint.shown(path)}: {million:.2f}M parameters, {dtype}, {device}")
        if model.config.rope_parameters["rope_type"] != "default":
            say(checkpoint.describe_positions(model.config))

    def encode(self, messages, open_thinking: bool, tools: list[dict] | None = None) -> list[int]:
        from dataset.lm_dataset import encode_document, encode_prompt

        if self.is_base:
            return encode_document(self.tokenizer, messages[-1]["content"])[:-1]  # bos + text, without eos
        return encode_prompt(self.tokenizer, messages, tools, open_thinking=open_thinking)

    def answer(self, prompt: list[int], settings: dict):
        """Yield (piece of text, tokens it took)."""
        for (new,) in self.engine.steps([prompt], self.tokenizer, **settings):
            yield new.piece, 1


def load_folder(folder: Path, tokenizer, overrides: dict):
    """The MiniMindForCausalLM in a transformers folder. Raises CheckpointError."""
    from model.model_minimind import MiniMindForCausalLM
    from trainer.checkpoint import CheckpointError

    try:
        model = MiniMindForCausalLM.from_pretrained(folder, dtype="float32", **overrides)
    except Exception as error:  # each format of weights has errors of its own
        raise CheckpointError(f"{folder} could not be loaded: {first_line(error)}") from None
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer has {len(tokenizer)} entries, its model {model.config.vocab_size}"
        )
    return model.eval()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refuse_for_folder(flags: dict[str, bool]):
    from trainer.checkpoint import CheckpointError

    for flag, given in flags.items():
        if given:
            raise CheckpointError(f"{flag} works for --weight, not for this transformers folder")


class Transformers:
    """A transformers folder of another architecture, with transformers' own generate. Code that comes with a
    folder is never run."""

    def __init__(self, args):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from trainer import checkpoint, runtime

        device = runtime.choose_device(args.device)
        refuse_for_folder(
            {
                "--dtype int8": args.dtype == "int8",
                "--use_compile 1": args.use_compile,
                f"--lora_weight {args.lora_weight}": has_adapters(args),
            }
        )
        dtype = runtime.choose_dtype(args.dtype, device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(args.load_from)
            model = AutoModelForCausalLM.from_pretrained(args.load_from, dtype=dtype)
        except Exception as error:  # each format of weights has errors of its own
            raise checkpoint.CheckpointError(
                f"{args.load_from} could not be loaded: {first_line(error)}"
            ) from None
        self.model = model.eval().to(device)
        self.is_base = False
        million = sum(p.numel() for p in self.model.parameters()) / 1e6
        dtype = str(dtype).removeprefix("torch.")
        say(f"{args.load_from}: {million:.2f}M parameters ({type(model).__name__}), {dtype}, {device}")
        self.torch = torch

    def encode(self, messages, open_thinking, tools=None):
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=True,
            open_thinking=open_thinking,
            enable_thinking=open_thinking,
        )
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answer(self, prompt, settings):
        """transformers calls back, a loop wants to be called: a thread in between."""
        import queue
        import threading

        from transformers import StoppingCriteria, StoppingCriteriaList

        from model.generation import TextStream

        torch, tokens, stop = self.torch, queue.Queue(), threading.Event()

        class Streamer:
            def __init__(self):
                self.prompt_seen = False

            def put(self, ids):
                if self.prompt_seen:
                    tokens.put(int(ids.reshape(-1)[0]))
                self.prompt_seen = True

            def end(self):
                pass

        class Stopped(StoppingCriteria):
            def __call__(self, ids, scores, **kwargs):
                return torch.full((ids.shape[0],), stop.is_set(), device=ids.device)

        ids = torch.tensor([prompt], device=self.model.device)
        options = {k: v for k, v in settings.items() if k in ("max_new_tokens", "repetition_penalty")}
        options["do_sample"] = settings["temperature"] > 0
        if options["do_sample"]:
            options |= {k: settings[k] for k in ("temperature", "top_k", "top_p", "min_p")}
        if settings["seed"] is not None:
            torch.manual_seed(settings["seed"])
        failure = []

        def work():
            try:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=Streamer(),
                    stopping_criteria=StoppingCriteriaList([Stopped()]),
                    **options,
                )
            except Exception as error:  # shown to the user by the thread that waits
                failure.append(error)
            finally:
                tokens.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        text = TextStream(self.tokenizer)
        try:
            while (token := tokens.get()) is not None:
                yield text.put(token), 1
            yield text.finish(), 0
        finally:
            stop.set()
            thread.join()
        if failure:
            raise ValueError(str(failure[0]))


def load_tokenizer(folder: Path):
    from transformers import AutoConfig, AutoTokenizer

    from model.model_minimind import MiniMindConfig
    from trainer.checkpoint import CheckpointError

    AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)  # it looks at a config.json beside

    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder}: there is neither config.json nor tokenizer.json in it")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # broken JSON, a broken tokenizer: each has errors of its own
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({first_line(error)})") from None


def is_folder(path: Path) -> bool:
    """A transformers folder? MiniMind takes any path with "model" in it for its own weights."""
    return (path / "config.json").exists()


def architecture(folder: Path) -> str:
    """`model_type` of a transformers folder. Raises CheckpointError when its config.json is broken."""
    from trainer.checkpoint import CheckpointError

    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from None


def load(args):
    foreign = is_folder(args.load_from) and architecture(args.load_from) != "minimind"
    return Transformers(args) if foreign else Native(args)


# ------------------------------------------------------------------------------------------------------------
# Talking
# ------------------------------------------------------------------------------------------------------------


def say(text: str):
    """About the program, not from the model: kept out of a pipe."""
    print(text, file=sys.stderr, flush=True)


def as_message(text: str) -> dict:
    """An answer as a message of the history, its thoughts apart."""
    thoughts, found, content = text.rpartition("</think>")
    message = {"role": "assistant", "content": (content if found else text).strip("\n")}
    if found and thoughts.strip():
        message["reasoning_content"] = thoughts.replace("<think>", "").strip("\n")
    return message


class Talk:
    """Asks the model and remembers the last --historys messages."""

    def __init__(self, model, args):
        self.model, self.args, self.history = model, args, []
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        self.settings = {name: getattr(args, name) for name in names}

    def ask(self, prompt: str) -> bool:
        """Print the answer as it comes. False when there is none because the prompt is wrong."""
        from dataset.lm_dataset import DataError

        past = self.history[-self.args.historys :] if self.args.historys else []
        messages = [*past, {"role": "user", "content": prompt}]
        print("🧠: ", end="", flush=True)
        pieces, count, start, interrupted = [], 0, time.perf_counter(), False
        try:
            ids = self.model.encode(messages, bool(self.args.open_thinking))
            for piece, tokens in self.model.answer(ids, self.settings):
                print(piece, end="", flush=True)
                pieces.append(piece)
                count += tokens
        except KeyboardInterrupt:
            interrupted = True
        except (ValueError, DataError) as error:
            print(flush=True)
            say(f"error: {' '.join(str(error).split())}")
            return False
        seconds = time.perf_counter() - start
        print(" [stopped]" if interrupted else "")
        if self.args.show_speed:
            print(f"[Speed]: {count / seconds:.2f} tokens/s")
        print(flush=True)
        text = "".join(pieces)
        if text.strip():
            self.history = [*messages, as_message(text)]
        if interrupted:
            raise KeyboardInterrupt
        return True


def piped_prompts():
    """The non-empty lines of standard input, as they arrive. Raises DataError on bytes that are not UTF-8."""
    from dataset.lm_dataset import DataError

    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"standard input, line {number}: not UTF-8 ({error.reason})") from None
        if text:
            yield text


def ask_all(talk: Talk, prompts) -> int:
    """Questions and answers one after another -> how many went wrong."""
    wrong = 0
    for prompt in prompts:
        print(f"💬: {prompt}")
        wrong += not talk.ask(prompt)
    return wrong


def chat(talk: Talk):
    """Questions typed in a terminal, until an empty line, /exit, Ctrl-D or Ctrl-C."""
    while True:
        try:
            prompt = input("💬: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if prompt in ("", "/exit"):
            return
        try:
            talk.ask(prompt)
        except KeyboardInterrupt:
            pass  # it ended the answer, which was said


def main(args):
    talk = Talk(load(args), args)
    fixed = TEXT_PROMPTS if talk.model.is_base else CHAT_PROMPTS
    wrong = 0
    try:
        if args.prompt:
            wrong = ask_all(talk, args.prompt)
        elif args.auto:
            wrong = ask_all(talk, fixed)
        elif sys.stdin is None or not sys.stdin.isatty():
            lines = piped_prompts() if sys.stdin is not None else iter(())
            first = next(lines, None)  # an empty pipe: /dev/null, a scheduler
            wrong = ask_all(talk, fixed if first is None else itertools.chain([first], lines))
        elif choose_mode() == "0":
            wrong = ask_all(talk, fixed)
        else:
            chat(talk)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if wrong:
        raise SystemExit(2)


def choose_mode() -> str:
    while True:
        try:
            answer = input("[0] eight fixed prompts\n[1] type your own\n").strip()
        except EOFError:
            return "1"
        if answer in ("0", "1"):
            return answer


if __name__ == "__main__":
    cli.run(main, parse_args)
