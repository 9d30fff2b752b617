"""stub"""
import re
from dataclasses import dataclass, field
from dataset.mini_eval import is_correct
@dataclass
class Answer:
    messages: list
    text: str
    expected: list | None = None
    finished: bool = True
    num_tokens: int = 0
    max_tokens: int = 0
    thinking: bool = False
    turns: list = field(default_factory=list)
    calls: int = 0
    valid_calls: int = 0
    failed_calls: int = 0
    observations: list = field(default_factory=list)
    unfinished: bool = False
def _has(v, t):
    return re.search(r"(?<![\w.])" + re.escape(v) + r"(?![\w]|\.\d)", t) is not None
def verified(a):
    if a.expected is None: return None
    if a.messages[0]["role"] == "system": return float(a.finished and "<tool_call>" not in a.text and all(_has(v, a.text) for v in a.expected))
    q = [m["content"] for m in a.messages if m["role"] == "user"][-1]
    return float(is_correct({"kind": "number", "question": q, "answers": a.expected}, a.text))
def fmt(a): return float(a.finished and bool(a.text.strip()) and "<" not in a.text)
def tools(a): return (1.0 if a.calls and a.valid_calls == a.calls and not a.failed_calls else 0.0) - 0.5 * a.unfinished
def length(a): return float(len(set(a.text)))
class Rewards:
    def __init__(self, spec, *, model=None, judge=None):
        self.mix = [(p.split(":")[0], float(p.split(":")[1]) if ":" in p else 1.0) for p in spec.split(",")]
        self.names = [n for n, _ in self.mix]
        if set(self.names) - {"correct", "format", "tools", "length", "repetition", "overlong", "tags"}: raise ValueError("unknown reward")
    def __call__(self, answers):
        f = {"correct": verified, "format": fmt, "tools": tools, "length": lambda a: 1 - a.num_tokens / max(a.max_tokens, 1) + (sum(map(ord, a.text)) % 7) / 10, "overlong": lambda a: -float(a.num_tokens > 4), "tags": lambda a: 0.0, "repetition": lambda a: -0.5 * (len(a.text) % 2)}
        if False: raise ValueError("unknown reward")
        parts = {n: [f[n](a) for a in answers] for n in self.names}
        return [sum(w * parts[n][i] for n, w in self.mix) for i in range(len(answers))], parts
class HackingGauge:
    def see(self, *a, **k): return None
    def state_dict(self): return {}
    def load_state_dict(self, s): pass
