"""Talk to an OpenAI-compatible server in the terminal: answers as they come, thoughts in grey, tools run.

    python scripts/serve_openai_api.py                               # in another terminal
    python scripts/chat_api.py
    python scripts/chat_api.py --model agent --tools calculate_math,text_length
    python scripts/chat_api.py --base_url http://127.0.0.1:11434/v1 --model qwen3:0.6b     # any other server
    echo "What is 12 * 7?" | python scripts/chat_api.py --tools calculate_math

/new forgets the conversation; /exit, an empty line, Ctrl-D or Ctrl-C end it. Ctrl-C during an answer ends the
answer.
"""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

import eval_llm
from scripts.conversation import connect, converse, explain, first_model, recent, remote
from trainer import cli
from trainer.tools import TOOLS

GREY, CYAN, PLAIN = "\033[90m", "\033[36m", "\033[0m"


def tool_names(text: str) -> list[str]:
    names = list(TOOLS) if text == "all" else [n for n in re.split(r"[,\s]+", text) if n and n != "none"]
    for name in names:
        if name not in TOOLS:
            raise argparse.ArgumentTypeError(
                f"there is no tool {name}: choose from {', '.join(TOOLS)}, or all"
            )
    return names


def parse_args(argv=None):
    parser = eval_llm.Parser(
        description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False, usage="%(prog)s [flags]"
    )
    g = parser.add_argument_group("server")
    g.add_argument(
        "--base_url", default="http://127.0.0.1:8998/v1", metavar="URL", help="its address, .../v1"
    )
    g.add_argument(
        "--api_key", metavar="KEY", help="without it the environment variable MINIMIND_API_KEY, else none"
    )
    g.add_argument("--model", metavar="NAME", help="without it the first one that the server lists")
    g = parser.add_argument_group("conversation")
    g.add_argument("--prompt", action="append", metavar="TEXT", help="ask this and end; may be repeated")
    g.add_argument("--system", default="", metavar="TEXT", help="system message")
    g.add_argument(
        "--history_messages_num",
        "--historys",
        type=cli.count,
        default=20,
        metavar="N",
        help="past messages the model sees, calls and their results included; 0 = none",
    )
    g.add_argument(
        "--tools",
        type=tool_names,
        default=[],
        metavar="NAMES",
        help="simulated tools that the model may call, separated by commas, or all",
    )
    g.add_argument(
        "--rounds", type=cli.positive_int, default=8, metavar="N", help="answers with calls in a row"
    )
    g.add_argument(
        "--open_thinking",
        type=cli.switch,
        metavar="0|1",
        help="1 = the answer begins with thoughts, 0 = it does not; without it as the server likes",
    )
    g = parser.add_argument_group("how to answer")
    g.add_argument("--max_tokens", type=cli.positive_int, default=2048, metavar="N", help="longest answer")
    g.add_argument("--temperature", type=cli.non_negative_float, default=0.7, metavar="X", help="0 = greedy")
    g.add_argument(
        "--top_p",
        type=cli.number_type(float, above=0, high=1),
        default=0.9,
        metavar="X",
        help="1 = all tokens",
    )
    g.add_argument("--seed", type=cli.count, metavar="N", help="repeat the same answers")
    args = parser.parse_args(argv)
    if args.prompt and not all(prompt.strip() for prompt in args.prompt):
        parser.error("--prompt is empty")
    return args


class Printer:
    """Shows the pieces of an answer in the terminal."""

    def __init__(self):
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.grey, self.cyan, self.plain = (GREY, CYAN, PLAIN) if colour else ("", "", "")
        self.kind = ""

    def show(self, kind: str, value):
        if kind == "reasoning":
            print((self.grey if self.kind != kind else "") + printable(value), end="", flush=True)
        elif kind == "content":
            print(
                (self.plain + "\n\n" if self.kind == "reasoning" else "") + printable(value),
                end="",
                flush=True,
            )
        elif kind == "call":
            text = printable(f"{value['name']} {value['arguments']}")
            print(f"{self.plain}\n{self.cyan}🔧 {text}{self.plain}")
        elif kind == "result":
            print(f"{self.cyan}   {printable(value['content'])}{self.plain}")
        elif kind == "end" and value == "length":
            print(f"{self.grey} [cut off at --max_tokens]{self.plain}", end="")
        elif kind == "end" and value == "rounds":
            print(f"{self.grey} [still calling tools after --rounds]{self.plain}", end="")
        if kind in ("reasoning", "content", "call", "result"):
            self.kind = kind

    def play(self, pieces, what_went_wrong) -> bool:
        """Show an answer to its end, or until Ctrl-C or an error, which what_went_wrong puts into a sentence.
        False after an error."""
        print("🧠: ", end="", flush=True)
        try:
            for kind, value in pieces:
                self.show(kind, value)
            self.finish()
        except KeyboardInterrupt:
            pieces.close()
            self.finish(" [stopped]")
        except Exception as error:
            self.finish()
            eval_llm.say(f"error: {what_went_wrong(error)}")
            return False
        return True

    def finish(self, note: str = ""):
        print(f"{self.plain}{note}\n", flush=True)


def printable(text: str) -> str:
    """Without control characters: a model's text must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() or ord(c) > 159))


class Talk:
    def __init__(self, args):
        self.client = connect(args.base_url, args.api_key, timeout=300)
        self.args, self.history = args, []
        self.tools = [TOOLS[name] for name in args.tools] or None
        self.model = args.model or first_model(self.client, args.base_url)

    def ask(self, prompt: str) -> bool:
        """Print the answer as it comes. False when it is none, or not whole."""
        args = self.args
        settings = dict(
            max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
        )
        system = [{"role": "system", "content": args.system}] if args.system else []
        messages = [
            *system,
            *recent(self.history, args.history_messages_num),
            {"role": "user", "content": prompt},
        ]
        begin = len(messages) - 1
        thinking = None if args.open_thinking is None else bool(args.open_thinking)
        speak = remote(self.client, self.model, settings, thinking)
        pieces = converse(speak, messages, self.tools, args.rounds)
        whole = Printer().play(pieces, lambda error: explain(error, args.base_url))
        if len(messages) > begin + 1:
            self.history += messages[begin:]
        return whole


def main(args):
    talk = Talk(args)
    eval_llm.say(f"{talk.model} at {args.base_url}; tools: {', '.join(args.tools) or 'none'}")
    wrong = 0
    if args.prompt or not sys.stdin.isatty():
        prompts = args.prompt or eval_llm.piped_prompts()
        wrong = eval_llm.ask_all(talk, prompts)
    while not (args.prompt or not sys.stdin.isatty()):
        try:
            prompt = input("💬: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if prompt in ("", "/exit"):
            break
        if prompt == "/new":
            talk.history.clear()
        else:
            talk.ask(prompt)
    if wrong:
        raise SystemExit(2)


if __name__ == "__main__":
    cli.run(main, parse_args)
