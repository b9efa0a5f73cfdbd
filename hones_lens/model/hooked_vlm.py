"""`HookedVLM`: a vision–language model with a named hook at every step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hones_lens.model import answers, bound, encoding, generation, prompting, saving, tl_weights, tokens
from hones_lens.model.config import VLMConfig
from hones_lens.model.decoding import Decoding
from hones_lens.model.dispatch import DeviceMap
from hones_lens.model.family import Family
from hones_lens.model.hooked_root import HookedRoot
from hones_lens.model.inputs import ModelInput, VLMInputs
from hones_lens.model.iterables import as_list
from hones_lens.model.nn.context import AttentionContext, KVCache
from hones_lens.model.nn.decoder import Decoder, layer_index
from hones_lens.model.nn.hook_point import HookPoint
from hones_lens.model.nn.norm import Norm
from hones_lens.model.nn.placed import is_placed
from hones_lens.model.nn.unembed import Unembedding
from hones_lens.model.padding import find_attention_mask
from hones_lens.model.positions import require_token_types
from hones_lens.model.saving import HFSource


class HookedVLM(HookedRoot, Family):
    """A decoder over text and image embeddings, with TransformerLens's hooks, names and weights.

    Make one with `from_pretrained` or `from_hf`. A family (a subclass, see `Family`) provides the modules and
    defines how images are processed; running, hooks, caches and generation are defined here.

    Args:
        cfg: Sizes and special tokens.
        decoder: Embedding, rotary positions, blocks, final norm and unembedding.
        vision: The vision tower, `vision_encoder`.
        projector: Maps its features to the decoder's width, `vision_projector`.

    Attributes:
        decoding: The settings of the checkpoint's generation config that change which token `generate`
            chooses; `Decoding()` is plain greedy. Every stage that generates answers follows them.
    """

    blocks: Any  # nn.ModuleList of Block
    embed: nn.Embedding
    ln_final: Norm
    unembed: Unembedding

    def __init__(self, cfg: VLMConfig, decoder: Decoder, vision: nn.Module, projector: nn.Module):
        super().__init__()
        self.cfg = cfg
        self.processor: Any = None
        self.decoding = Decoding()
        self.hf_source: HFSource | None = None
        self.vision_encoder = vision
        self.vision_projector = projector
        self.embed = decoder.embed
        self.embed_scale = decoder.embed_scale
        self.rotary, self.sliding_rotary = decoder.rotary, decoder.sliding_rotary
        self.hook_text_embed = HookPoint()  # [batch pos d_model]
        self.hook_image_embed = HookPoint()  # [image token d_model], or [image_token d_model] at many sizes
        self.hook_embed = HookPoint()  # [batch pos d_model], images merged in
        self.blocks = nn.ModuleList(decoder.blocks)
        self.ln_final = decoder.ln_final
        self.unembed = decoder.unembed
        self.setup()

    # -- construction ----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> HookedVLM:
        """Build the family's modules without weights (on the meta device) from a Hugging Face config."""

    @staticmethod
    def from_pretrained(
        name: str,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        plain_greedy: bool = False,
        revision: str | None = None,
        device_map: DeviceMap | None = None,
        **processor_options: Any,
    ) -> HookedVLM:
        """Load a shipped checkpoint, an alias of `model_configs/`, a local folder or a Hub id.

        The weights need no gradients, so that a pass keeps no graph. Those of activations are had all the
        same (backward hooks, `run_with_cache(incl_bwd=True)`, `activation_gradients`). To train:
        `model.requires_grad_()`.

        Args:
            name: E.g. `tiny-llava`, `llava`, `path/to/folder`, `llava-hf/llava-1.5-7b-hf`.
            device: Default: the GPU if there is one. `auto` is `device_map="auto"`.
            dtype: Default: float32 on a CPU, the checkpoint's own on a GPU. Logits are in float32 also in
                bfloat16 and float16 (see `set_unembed_in_float32`).
            revision: Branch, tag or commit on the Hub; default: the one that is known to work, if any.
            plain_greedy: Leave out the settings of the checkpoint's generation config that change which
                token follows, such as a `repetition_penalty`.
            device_map: For models larger than a device (needs accelerate): `auto`, `balanced`,
                `balanced_low_0`, `sequential`, or a device, `cpu` or `disk` for each of Hugging Face's
                modules (`{"lm_head": "disk", "": 0}`). Weights rest there; activations, hooks, caches and
                results are on one device. Weights that rest elsewhere can be read, not edited.
            processor_options: What the family's processor takes: `min_pixels` and `max_pixels` for
                Qwen2.5-VL, which bound the size that an image is brought to; none for LLaVA.

        Raises:
            ImportError: A `device_map` without accelerate.
            ValueError: An unknown name, device or option, an unsupported family or config value, weights
                that are missing, left over, quantised (but by bitsandbytes) or too large (says how much
                memory is needed and free), or a folder that holds no whole checkpoint.
        """
        from hones_lens.model import loading

        options: dict[str, Any] = {"plain_greedy": plain_greedy, "revision": revision, **processor_options}
        return loading.load_model(name, device, dtype, device_map=device_map, **options)

    @staticmethod
    def from_hf(hf_model: Any, processor: Any = None) -> HookedVLM:
        """Hook an in-memory Hugging Face model; weights are shared, the model is not changed.

        Of a model that accelerate has laid over devices, CPU and disk (`device_map`), the weights stay where
        they are.

        The shared weights need no gradients here, whether or not they do there (see `from_pretrained`).

        Raises:
            TypeError: Not a Hugging Face model for images and text, or one inside a wrapper (PEFT,
                torch.compile, DataParallel); says how to get it out.
            ValueError: An unsupported family, config value or weight; weights that are quantised (but by
                bitsandbytes, where it is installed) or were never loaded, of several dtypes, or, without
                accelerate, devices; adapters or hooks in it.
        """
        from hones_lens.model import loading

        return loading.hook_hf_model(hf_model, processor)

    save_pretrained = saving.save_pretrained

    tokenizer = property(tokens.tokenizer_of, doc=tokens.tokenizer_of.__doc__)
    image_processor = property(tokens.image_processor_of, doc=tokens.image_processor_of.__doc__)
    image_token = property(tokens.image_token_of, doc=tokens.image_token_of.__doc__)

    # -- inputs ----------------------------------------------------------------------------------

    prepare = prompting.prepare
    render = prompting.render

    def as_inputs(self, model_input: ModelInput) -> VLMInputs:
        """Any kind of model input as VLMInputs on this model's device, images located and counted.

        Without an attention mask, the padding tokens on the left and on the right of each row are padding
        (see `padding.find_attention_mask`).

        Raises:
            ValueError: Image tokens without pixels, pixels without image tokens, or counts that
                differ (names both counts); padding that can't be told from text.
        """
        model_input = as_list(model_input)
        if isinstance(model_input, (str, list, tuple)):
            ids, mask = tokens.encode(self, model_input)
            model_input = {"input_ids": ids, "attention_mask": mask}
        if isinstance(model_input, Tensor):
            ids = model_input if model_input.ndim == 2 else model_input[None]
            model_input = {"input_ids": ids}
        if isinstance(model_input, Mapping):
            if self.reads_token_types:
                require_token_types(model_input)
            model_input = VLMInputs.from_hf(model_input)
        assert isinstance(model_input, VLMInputs)
        inputs = model_input.to(self.cfg.device, self.cfg.dtype)
        if not self.reads_token_types:
            inputs = replace(inputs, token_type_ids=None)
        if inputs.mask_is_assumed:
            mask = find_attention_mask(self, inputs.input_ids)
            inputs = replace(inputs, attention_mask=mask, mask_is_assumed=False)
        for key in ("pixel_attention_mask", "image_sizes", "batch_num_images"):
            if getattr(inputs, key) is not None and key not in self.more_inputs:
                raise ValueError(f"inputs key {key!r} is not read by {self.family}")
        return self.locate_images(inputs)

    def bind(self, inputs: ModelInput) -> bound.BoundModel:
        """This model with the pictures of `inputs`, for functions that pass tokens alone."""
        return bound.BoundModel(self, self.as_inputs(inputs))

    with_image_embeds = encoding.with_image_embeds
    encoded = encoding.encoded

    def continuation(self, prompt: str, answer: str, n_images: int = 1) -> list[int]:
        """The ids of an answer as it is tokenized after this prompt."""
        return prompting.continuation(self, prompt, answer, n_images)

    # -- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        model_input: ModelInput | Float[Tensor, "batch pos d_model"],
        *,
        inputs: VLMInputs | Mapping[str, Tensor] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
    ) -> Any:
        """Logits for a batch.

        Args:
            model_input: VLMInputs, what a Hugging Face processor returns, or bare text tokens. With
                `start_at_layer` the residual stream [batch pos d_model] that enters that block.
            inputs: With `start_at_layer`: the inputs that give positions and mask.
            start_at_layer: Skip the embedding, the vision tower and all blocks below. (The first
                `cfg.n_deepstack` blocks need the tower, unless `with_image_embeds` made `inputs`.)
            stop_at_layer: Skip this block and all above, and return the residual stream.
            logits_to_keep: Unembed only the last so many positions, or these (a tensor of indices);
                0 for all. Every hook, `ln_final`'s too, sees all positions.
            return_type: `loss` is the mean cross-entropy of the labels, else of the answer tokens, or of all
                text tokens where no answer is marked; `both` gives logits and loss, as in TransformerLens;
                None computes no logits and returns None.

        Returns:
            Logits [batch pos d_vocab], a scalar loss, or `LogitsAndLoss`; with `stop_at_layer` the residual
            stream [batch pos d_model].

        Raises:
            ValueError: Inputs that don't fit (see `as_inputs`), a layer out of range, a residual without
                `inputs` or `inputs` without one, an unknown `return_type`, or a loss with `stop_at_layer` or
                `logits_to_keep`.
        """
        answers.check_return_type(return_type, stop_at_layer, logits_to_keep)
        first = layer_index(start_at_layer, 0, self.cfg.n_layers)
        last = layer_index(stop_at_layer, self.cfg.n_layers, self.cfg.n_layers)
        if first > 0 or last < self.cfg.n_layers:
            self.note_skipped(
                "layers", f"only blocks {first} … {last - 1} ran (start_at_layer, stop_at_layer)"
            )
        located, resid = self._entering(model_input, inputs, start_at_layer)
        resid = self.run_blocks(resid, self.attention_context(located, first=first), first, last)
        if stop_at_layer is not None:
            return resid
        if return_type is None:
            self.ln_final(resid)  # its hooks run, as in TransformerLens
            return None
        logits = self._logits(resid, logits_to_keep)
        if return_type == "logits":
            return logits
        loss = answers.answer_loss(logits, located)
        return loss if return_type == "loss" else answers.LogitsAndLoss(logits, loss)

    def _entering(
        self,
        model_input: ModelInput,
        inputs: ModelInput | None,
        start_at_layer: int | None,
    ) -> tuple[VLMInputs, Tensor]:
        """The inputs of a forward pass, and the residual stream that enters its first block."""
        if start_at_layer is None:
            if inputs is not None:
                raise ValueError("inputs= goes with start_at_layer and a residual stream [batch pos d_model]")
            located = self.as_inputs(model_input)
            self.check_last_positions(located)
            return (encoded := self.encoded(located)), self._merged(encoded)
        if inputs is None or not isinstance(model_input, Tensor) or not model_input.is_floating_point():
            raise ValueError("start_at_layer takes a residual stream [batch pos d_model] and inputs=")
        located = self.as_inputs(inputs)
        self.check_last_positions(located)
        if model_input.shape[:2] != located.input_ids.shape:
            raise ValueError(
                f"residual {tuple(model_input.shape)} does not fit inputs {tuple(located.input_ids.shape)}"
            )
        return located, model_input

    def embed_text(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Token embeddings as they enter the stream; runs `hook_text_embed`."""
        embeds = self.embed(ids)
        if self.embed_scale is not None:
            embeds = embeds * torch.tensor(self.embed_scale, dtype=embeds.dtype, device=embeds.device)
        return self.hook_text_embed(embeds)

    def embed_inputs(self, inputs: VLMInputs) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters block 0: text embedded, images encoded and merged in."""
        return self._merged(self.encoded(inputs))

    def enter(
        self, inputs: VLMInputs, kv_cache: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch pos d_model"], AttentionContext]:
        """The stream that enters block 0, and what all blocks read besides it; images are encoded once."""
        encoded = self.encoded(inputs)
        return self._merged(encoded), self.attention_context(encoded, kv_cache=kv_cache)

    def _merged(self, encoded: VLMInputs) -> Float[Tensor, "batch pos d_model"]:
        embeds = self.embed_text(encoded.input_ids)
        if encoded.image_embeds is not None:
            images = self.hook_image_embed(encoded.image_embeds[..., : self.cfg.d_model]).to(embeds.dtype)
            embeds = embeds.masked_scatter(encoded.image_mask[..., None], images)
        return self.hook_embed(embeds)

    def attention_context(
        self,
        inputs: VLMInputs,
        n_queries: int | None = None,
        kv_cache: KVCache | None = None,
        first: int = 0,
    ) -> AttentionContext:
        """What blocks from `first` on read besides the stream: rotations, masks, what pictures write.

        `n_queries`: of the last positions alone, which are text. Pictures are encoded where they are needed.
        """
        context = self.rotations(inputs) if n_queries else self.token_context(inputs, first)
        n_queries = n_queries or inputs.input_ids.shape[1]
        context = context.masked(inputs.attention_mask.bool(), n_queries)
        return replace(context.behind(n_queries), kv_cache=kv_cache)

    token_context = encoding.token_context

    def rotations(self, inputs: VLMInputs) -> AttentionContext:
        """The rotations of all tokens, and which of them see each other."""
        positions, groups = self.positions(inputs), self.mutual_groups(inputs)
        cos, sin = self.rotary(positions, self.cfg.dtype)
        whole = AttentionContext(cos, sin, causal=True, groups=groups)
        if (window := self.cfg.sliding_window) is None:
            return whole
        if self.sliding_rotary is not None:
            cos, sin = self.sliding_rotary(positions, self.cfg.dtype)
        return replace(whole, sliding=replace(whole, cos=cos, sin=sin, window=window))

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
        first: int = 0,
        last: int | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after blocks `first` … `last` − 1, with the positions and mask of `context`."""
        self.note_run()
        for block in self.blocks[first : self.cfg.n_layers if last is None else last]:
            resid = block(resid, context)
        return resid

    def next_token_logits(
        self, inputs: VLMInputs, said: Int[Tensor, "batch new"], kv_cache: KVCache | None
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits of the token that follows the prompt and `said`.

        Args:
            inputs: The prompts (from `as_inputs`).
            said: The tokens generated so far.
            kv_cache: Holds the prompt and all of `said` but the last, and is extended; None
                computes the whole sequence, images too.
        """
        extended = inputs.extended(said)
        if kv_cache is None or said.shape[1] == 0:
            resid, context = self.enter(extended, kv_cache)
        else:
            resid = self.hook_embed(self.embed_text(said[:, -1:]))
            context = self.attention_context(extended, 1, kv_cache)
        return self._logits(self.run_blocks(resid, context, 0, self.cfg.n_layers), 1)[:, -1]

    def _logits(self, resid: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        normalized = self.ln_final(resid)  # everywhere, so that its hooks have the blocks' positions
        if isinstance(logits_to_keep, Tensor):
            normalized = normalized[:, logits_to_keep]
        elif logits_to_keep:
            normalized = normalized[:, -logits_to_keep:]
        return self.unembed(normalized)

    generate = generation.generate
    log_probs = answers.log_probs

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether every pass makes `attn.hook_{q,k,v}_input` (a hook on one of them suffices)."""
        self.cfg = replace(self.cfg, use_split_qkv_input=use_split_qkv_input)
        for block in self.blocks:
            block.attn.use_split_qkv_input = use_split_qkv_input

    def set_unembed_in_float32(self, unembed_in_float32: bool) -> None:
        """Whether logits of a model in bfloat16 or float16 are computed and returned in float32 (default).

        Rounded to the model's own type, as Hugging Face's, many candidates of a ranking have equal scores.

        Raises:
            ValueError: The family's unembedding can't.
        """
        if unembed_in_float32 and not hasattr(self.unembed, "in_float32"):
            raise ValueError(f"{type(self.unembed).__name__} computes logits in the model's own type alone")
        self.cfg = replace(self.cfg, unembed_in_float32=unembed_in_float32)
        unembed: Any = self.unembed
        unembed.in_float32 = unembed_in_float32

    # -- device ----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HookedVLM:
        if is_placed(self):
            raise ValueError(
                "a model whose weights are on several devices or offloaded stays where and as it is: load it "
                "with another device, device_map or dtype instead"
            )
        parent: Any = super()  # PyTorch leaves it untyped
        moved = parent._apply(fn, recurse)
        weight = self.embed.weight
        self.cfg = replace(self.cfg, device=weight.device, dtype=weight.dtype)
        return moved

    # -- TransformerLens's names for tokens and weights ------------------------------------------

    to_tokens = tokens.to_tokens
    to_single_token = tokens.to_single_token
    to_str_tokens = tokens.to_str_tokens
    to_string = tokens.to_string
    tokens_to_residual_directions = tl_weights.tokens_to_residual_directions
    accumulated_bias = tl_weights.accumulated_bias
    tl_parameters = tl_weights.tl_parameters

    QK = property(tl_weights.qk, doc=tl_weights.qk.__doc__)
    OV = property(tl_weights.ov, doc=tl_weights.ov.__doc__)
    W_Q = tl_weights.StackedWeight("attn", "W_Q")  # [layer head d_model d_head]
    W_K = tl_weights.StackedWeight("attn", "W_K")  # [layer kv_head d_model d_head]
    W_V = tl_weights.StackedWeight("attn", "W_V")  # [layer kv_head d_model d_head]
    W_O = tl_weights.StackedWeight("attn", "W_O")  # [layer head d_head d_model]
    b_Q = tl_weights.StackedWeight("attn", "b_Q")  # [layer head d_head]
    b_K = tl_weights.StackedWeight("attn", "b_K")  # [layer kv_head d_head]
    b_V = tl_weights.StackedWeight("attn", "b_V")  # [layer kv_head d_head]
    b_O = tl_weights.StackedWeight("attn", "b_O")  # [layer d_model]
    W_gate = tl_weights.StackedWeight("mlp", "W_gate")  # [layer d_model d_mlp]
    W_in = tl_weights.StackedWeight("mlp", "W_in")  # [layer d_model d_mlp]
    W_out = tl_weights.StackedWeight("mlp", "W_out")  # [layer d_mlp d_model]
    b_in = tl_weights.StackedWeight("mlp", "b_in")  # [layer d_mlp]
    b_out = tl_weights.StackedWeight("mlp", "b_out")  # [layer d_model]

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings as they enter the stream; no view where they are scaled (see `embed_text`)."""
        return tl_weights.token_embeddings(self)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding (a view)."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Bias of the unembedding; zeros where the family has none."""
        return self.unembed.b_U
