"""The model of model_minimind.py as a transformers class: `generate`, `save_pretrained`, Cache, Trainer."""

from transformers import GenerationMixin, PreTrainedModel

from model.model_minimind import MiniMindConfig, MiniMindLM


class MiniMindForCausalLM(MiniMindLM, PreTrainedModel, GenerationMixin):
    """MiniMindLM with everything transformers adds; same parameters, same forward pass."""

    config_class = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig):
        PreTrainedModel.__init__(self, config)
        self.build()
        self.post_init()  # draws the weights with MiniMindLM._init_weights

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value
