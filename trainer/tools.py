"""stub"""
import re, json
from dataclasses import dataclass
from dataset.mini_tools import TOOLS, run_tool
@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict
    error: str = ""
def parse_calls(text):
    out = []
    for b in re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", text, re.S):
        try:
            d = json.loads(b); out.append(Call(d["name"], d["arguments"] if isinstance(d["arguments"], dict) else {}))
        except Exception as e: out.append(Call("", {}, "bad"))
    return out
def execute(call, allowed=None, seconds=2.0, extra=None):
    if call.error: return json.dumps({"error": call.error}), False
    r = run_tool(call.name, call.arguments)
    return json.dumps(r, ensure_ascii=False), "error" not in r
def offered(tools): return [t["function"]["name"] for t in tools or []]
