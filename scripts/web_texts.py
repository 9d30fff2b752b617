"""What the pages of the web demo say, in English and Chinese, and how words of others get onto them."""

import re

import streamlit as st

KEPT = {"persist_state": "session"}  # a setting that is still there after a look at the other page
TEXTS = {
    "English": {
        "chat": "Chat",
        "training": "Training",
        "model": "Model",
        "source": "Where the model is",
        "here": "on this computer",
        "server": "server",
        "weights": "Weights",
        "adapters": "Adapters",
        "yarn": "Long context (YaRN)",
        "yarn_help": "Stretches positions x16 over the length that the weights were trained at",
        "address": "Address (OpenAI-compatible, .../v1)",
        "key": "API key",
        "name": "Model name",
        "answers": "Answers",
        "thinking": "Think first",
        "tools": "Tools it may call",
        "system": "System prompt",
        "temperature": "Temperature (0 = always the likeliest word)",
        "length": "Longest answer, in tokens",
        "history": "Past messages it sees",
        "seed": "Seed (0 = other answers every time)",
        "new": "New conversation",
        "ask": "Ask something",
        "thoughts": "Thoughts",
        "called": "called",
        "result": "result",
        "stop": "Stop",
        "again": "Answer again",
        "edit": "Edit",
        "delete": "Delete this and what it answers",
        "save": "Ask again",
        "cancel": "Cancel",
        "export": "Export",
        "nothing": "There are no weights in {folder} yet. Train some, or choose a server:",
        "empty": "Say hello. The names tell what the weights can do: **full_sft** chats, **reason** thinks "
        "first, **agent** calls tools, **pretrain** continues text.",
        "cut": "cut off at the longest answer",
        "rounds": "still calling tools: stopped",
        "silent": "(an empty answer)",
        "stopped": "stopped",
        "loading": "Loading",
        "busy": "This model is answering in another window: try again in a moment.",
        "no_log": "No run has written a log into {folder} yet. Start one, for example:",
        "run": "Run",
        "figures": "Figures",
        "live": "Keep up with the run",
        "samples": "Samples",
        "step": "step",
        "reward": "reward",
        "folder": "Folder of the logs",
    },
    "中文": {
        "chat": "对话",
        "training": "训练",
        "model": "模型",
        "source": "模型在哪里",
        "here": "本机",
        "server": "服务器",
        "weights": "权重",
        "adapters": "适配器",
        "yarn": "长上下文（YaRN）",
        "yarn_help": "在权重的训练长度上把位置拉伸 16 倍",
        "address": "地址（兼容 OpenAI，以 /v1 结尾）",
        "key": "API 密钥",
        "name": "模型名称",
        "answers": "回答",
        "thinking": "先思考再回答",
        "tools": "可以调用的工具",
        "system": "系统提示词",
        "temperature": "温度（0 = 总选最可能的词）",
        "length": "回答的最大长度（token）",
        "history": "能看到的历史消息数",
        "seed": "随机种子（0 = 每次都不同）",
        "new": "新对话",
        "ask": "问点什么",
        "thoughts": "思考过程",
        "called": "调用了",
        "result": "结果",
        "stop": "停止",
        "again": "重新回答",
        "edit": "编辑",
        "delete": "删除这一轮",
        "save": "重新提问",
        "cancel": "取消",
        "export": "导出",
        "nothing": "{folder} 里还没有权重。先训练一个，或者选择服务器：",
        "empty": "打个招呼吧。权重的名字说明它会什么：**full_sft** 会对话，**reason** 先思考，"
        "**agent** 会调用工具，**pretrain** 续写文本。",
        "cut": "达到最大长度，已截断",
        "rounds": "一直在调用工具，已停止",
        "silent": "（空回答）",
        "stopped": "已停止",
        "loading": "正在加载",
        "busy": "这个模型正在另一个窗口里回答，请稍后再试。",
        "no_log": "{folder} 里还没有训练日志。先开始训练，例如：",
        "run": "训练任务",
        "figures": "指标",
        "live": "实时更新",
        "samples": "样本",
        "step": "步",
        "reward": "奖励",
        "folder": "日志所在文件夹",
    },
}


def text(name: str) -> str:
    return TEXTS[st.session_state.get("language") or "English"][name]


ZERO = "\u200b"  # a space without width, where a character must not begin anything


def harmless(words: str) -> str:
    """A model's words as Markdown that fetches nothing, and has no formulas, colours or icons by accident;
    its lines stay lines. (Streamlit escapes HTML by itself.)"""
    words = words.replace("![", f"!{ZERO}[")  # everywhere: what looks like code to us need not be code
    parts = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", words, flags=re.DOTALL)
    for i in range(0, len(parts), 2):
        part = without_signs(parts[i])
        part = re.sub(r"(\\*)\$", lambda m: m[0] if len(m[1]) % 2 else m[1] + "\\$", part)
        parts[i] = re.sub(r"(?<=\S)\n(?=\S)", "  \n", part)
    return "".join(parts)


def plain(words: str) -> str:
    """A line of words that is no Markdown at all: of an error, a name."""
    return without_signs(re.sub(r"([\\`*_{}\[\]#|<>~$&])", r"\\\1", words))


def without_signs(words: str) -> str:
    """Without Streamlit's own :red[...], :smile:, :material/home:."""
    return re.sub(r":(?=[\w+\-/]+\\?[\[:])", f":{ZERO}", words)
