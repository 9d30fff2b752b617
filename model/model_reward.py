"""A reward model: the language model's blocks, and one number per answer instead of logits.

    r(x, y) = v . h_T          h_T: final hidden state at the answer's last token, v: a learned vector

Names in the state dict are those of transformers' `...ForSequenceClassification` with one label
(`model....`, `score.weight`).
"""

import torch
from torch import nn

from model.model_minimind import Block, MiniMindConfig, MiniMindModel


class RewardModel(nn.Module):
    """`score` starts at zero: every answer is worth the same, and the first loss is exactly ln 2."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.model = MiniMindModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, input_ids, position_ids=None, last=None):
        """input_ids, position_ids (R, T); last (N,): flat places of the tokens at which to score, None = the
        last column. Returns rewards (N,) float32 and the balance loss (times its coefficient; None when
        dense)."""
        hidden, aux_loss, _ = self.model(input_ids, position_ids=position_ids)
        hidden = hidden[:, -1] if last is None else hidden.flatten(0, 1)[last]
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = self.score(hidden.float()).squeeze(1)
        return rewards, None if aux_loss is None else aux_loss * self.config.router_aux_loss_coef

    @torch.no_grad()
    def rate(self, sequences: list[list[int]], batch_size: int = 16) -> torch.Tensor:
        """Rewards (N,) of whole sequences of token ids: the rendered conversation through the answer's
        <|im_end|>."""
        device, rewards = self.score.weight.device, []
        for start in range(0, len(sequences), batch_size):
            part = sequences[start : start + batch_size]
            width = max(map(len, part))
            ids = torch.tensor([ids + [self.config.pad_token_id] * (width - len(ids)) for ids in part])
            last = torch.tensor([i * width + len(ids) - 1 for i, ids in enumerate(part)])
            # padding stands behind the answer, where causal attention does not look
            positions = torch.arange(width).repeat(len(part), 1)
            rewards.append(self(ids.to(device), positions.to(device), last.to(device))[0])
        return torch.cat(rewards) if rewards else torch.zeros(0)

    def compile_blocks(self, dynamic: bool = False):
        self.model.run_block = torch.compile(Block.forward, dynamic=dynamic)
        return self

    def uncompile_blocks(self):
        self.model.run_block = Block.forward
