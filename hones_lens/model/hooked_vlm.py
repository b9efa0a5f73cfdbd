"""`HookedVLM`: a vision–language model whose every step can be read and edited by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache, FactoredMatrix, HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformers import AutoProcessor

from hones_lens.model import bound, generation, prompting, tl_weights
from hones_lens.model.caching import keeping_hooks
from hones_lens.model.config import VLMConfig
from hones_lens.model.inputs import Region, VLMInputs
from hones_lens.model.nn.attention import Attention, AttentionContext, KVCache, attention_mask
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.mlp import GatedMLP
from hones_lens.model.nn.norm import RMSNorm
from hones_lens.model.nn.rotary import Rotary
from hones_lens.model.nn.unembed import Unembed
from hones_lens.model.weights import WeightMap

ModelInput = VLMInputs | Mapping[str, Tensor] | Tensor | str | Sequence[str]
Hook = tuple[str | Callable[[str], bool], Callable]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
_COSTLY = ("attn.hook_result", "attn.hook_q_input", "attn.hook_k_input", "attn.hook_v_input")


class HookedVLM(HookedRootModule):
    """A decoder over text and image embeddings, with TransformerLens's hooks, names and weights.

    Make one with `from_pretrained` or `from_hf`. A family adds its vision encoder, projector,
    positions and prompt format; everything else is here.
    """

    family = ""
    processor_class: Any = AutoProcessor  # has from_pretrained(folder, revision=…, **options)
    processor_options: tuple[str, ...] = ()
    answer_separator = ""
    default_chat_template = ""
    blocks: Any  # nn.ModuleList of Block

    def __init__(
        self, cfg: VLMConfig, vision: nn.Module, projector: nn.Module, rotary: Rotary, qkv_bias: bool
    ):
        super().__init__()
        self.cfg = cfg
        self.processor: Any = None
        self.vision_encoder = vision
        self.vision_projector = projector
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.rotary = rotary
        self.hook_text_embed = HookPoint()  # [batch pos d_model]
        self.hook_image_embed = HookPoint()  # [image token d_model], or [image_token d_model] at many sizes
        self.hook_embed = HookPoint()  # [batch pos d_model], images merged in
        heads = (cfg.n_heads, cfg.n_key_value_heads, cfg.d_head)
        self.blocks = nn.ModuleList(
            Block(
                Attention(layer, cfg.d_model, *heads, qkv_bias=qkv_bias),
                GatedMLP(cfg.d_model, cfg.d_mlp, cfg.act_fn),
                RMSNorm(cfg.d_model, cfg.eps),
                RMSNorm(cfg.d_model, cfg.eps),
            )
            for layer in range(cfg.n_layers)
        )
        self.ln_final = RMSNorm(cfg.d_model, cfg.eps)
        self.unembed = Unembed(cfg.d_model, cfg.d_vocab)
        self._forwards = 0
        self.setup()

    # -- what a family provides ------------------------------------------------------------------

    @classmethod
    def from_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> HookedVLM:
        """Build the modules without weights (on the meta device) from a Hugging Face config."""
        raise NotImplementedError(f"{cls.__name__} has no from_config")

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """Which weight of Hugging Face's becomes which of ours."""
        raise NotImplementedError(f"{cls.__name__} has no weight_map")

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "image token d_model"]:
        """Image embeddings as the decoder reads them; runs the vision hooks."""
        raise NotImplementedError(f"{type(self).__name__} has no encode_images")

    def positions(self, inputs: VLMInputs) -> Tensor:
        """Rotary positions of every token, [batch pos] or [3 batch pos]."""
        raise NotImplementedError(f"{type(self).__name__} has no positions")

    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        """Fill in `image_mask` and `grids`; raise where images and image tokens disagree."""
        raise NotImplementedError(f"{type(self).__name__} has no locate_images")

    def process_images(self, images: Sequence) -> tuple[dict[str, Any], list[int]]:
        """What the vision tower reads for these pictures, and how many tokens each becomes."""
        raise NotImplementedError(f"{type(self).__name__} has no process_images")

    def pictures(self, inputs: VLMInputs) -> list[Float[Tensor, "channel _ _"]]:
        """All images of all rows as the vision tower reads them, [channel height width] each, normalised."""
        raise NotImplementedError(f"{type(self).__name__} has no pictures")

    def with_pictures(self, inputs: VLMInputs, pictures: Sequence[Float[Tensor, "channel _ _"]]) -> VLMInputs:
        """The same inputs with other pictures of the same sizes, not encoded yet; undoes `pictures`."""
        raise NotImplementedError(f"{type(self).__name__} has no with_pictures")

    def shown_region(self, width: int, height: int) -> Region:
        """The part of a picture that reaches the vision tower: left, top, right, bottom in its pixels."""
        return (0.0, 0.0, float(width), float(height))

    # -- construction ----------------------------------------------------------------------------

    @staticmethod
    def from_pretrained(
        name: str,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        **processor_options: Any,
    ) -> HookedVLM:
        """Load a shipped checkpoint, an alias of `model_configs/`, a local folder or a Hub id.

        Args:
            name: E.g. `tiny-llava`, `llava`, `path/to/folder`, `llava-hf/llava-1.5-7b-hf`.
            device: Default: the GPU if there is one.
            dtype: Default: float32 on a CPU, the checkpoint's own on a GPU.
            processor_options: What the family's processor takes: `min_pixels` and `max_pixels` for
                Qwen2.5-VL, which bound the size that an image is brought to; none for LLaVA.

        Raises:
            ValueError: An unknown name or option, an unsupported family or config value, weights that are
                missing or left over.
        """
        from hones_lens.model import loading

        return loading.load_model(name, device, dtype, **processor_options)

    @staticmethod
    def from_hf(hf_model: Any, processor: Any = None) -> HookedVLM:
        """Hook an in-memory Hugging Face model; weights are shared, the model is not changed.

        Raises:
            ValueError: An unsupported family, config value or weight.
        """
        from hones_lens.model import loading

        return loading.hook_hf_model(hf_model, processor)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer.

        Raises:
            ValueError: The model was made without a processor.
        """
        return self._processor_given().tokenizer

    @property
    def image_processor(self) -> Any:
        """The processor's image processor.

        Raises:
            ValueError: The model was made without a processor.
        """
        return self._processor_given().image_processor

    def _processor_given(self) -> Any:
        if self.processor is None:
            raise ValueError(
                "this model has no processor: pass one to HookedVLM.from_hf(hf_model, processor)"
            )
        return self.processor

    # -- inputs ----------------------------------------------------------------------------------

    def prepare(
        self,
        images: prompting.Pictures | Sequence[prompting.Pictures],
        prompts: str | Sequence[str],
        answers: str | Sequence[str] | None = None,
    ) -> VLMInputs:
        """Pictures and prompts to a left-padded batch in the model's chat format.

        Args:
            images: For each prompt a picture (PIL image or path), a list of them, or None.
            prompts: What the user says; one string or a list.
            answers: What the assistant says, one a prompt: the inputs then hold prompt and answer,
                with `answer_mask` at the answer's tokens (no end-of-sequence token is added).

        Raises:
            FileNotFoundError, ValueError: A missing or unreadable image, an empty prompt or answer,
                lengths that differ, a prompt longer than the context.
        """
        return prompting.prepare(self, images, prompts, answers)

    def render(self, prompt: str, image_tokens: Sequence[int]) -> str:
        """The text that is tokenized: chat format applied, each image token repeated."""
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        template = template or self.default_chat_template
        text = prompting.render_chat(self.tokenizer, template, prompt, len(image_tokens))
        return prompting.expand_images(text, self.image_token, image_tokens)

    @property
    def image_token(self) -> str:
        """The token that stands for one image token in text."""
        return self.tokenizer.convert_ids_to_tokens(self.cfg.image_token_id)

    def as_inputs(self, model_input: ModelInput) -> VLMInputs:
        """Any kind of model input as VLMInputs on this model's device, images located and counted.

        Raises:
            ValueError: Image tokens without pixels, pixels without image tokens, or counts that
                differ; names both counts.
        """
        if isinstance(model_input, (str, list, tuple)):
            ids, mask = self._encode(model_input)
            model_input = {"input_ids": ids, "attention_mask": mask}
        if isinstance(model_input, Tensor):
            ids = model_input if model_input.ndim == 2 else model_input[None]
            model_input = {"input_ids": ids}
        if isinstance(model_input, Mapping):
            model_input = VLMInputs.from_hf(model_input)
        assert isinstance(model_input, VLMInputs)
        return self.locate_images(model_input.to(self.cfg.device, self.cfg.dtype))

    def bind(self, inputs: ModelInput) -> bound.BoundModel:
        """This model with the pictures of `inputs`, for functions that pass tokens alone."""
        return bound.BoundModel(self, self.as_inputs(inputs))

    @torch.no_grad()
    def with_image_embeds(self, inputs: VLMInputs) -> VLMInputs:
        """The same inputs with their images encoded once and for all; vision hooks run here only."""
        if inputs.pixel_values is None or inputs.image_embeds is not None:
            return inputs
        return replace(inputs, image_embeds=self.encode_images(inputs))

    def continuation(self, prompt: str, answer: str, n_images: int = 1) -> list[int]:
        """The ids that an answer has where it really follows this prompt."""
        text = self.render(prompt, [1] * n_images)
        return prompting.continuation(self.tokenizer, text, self.answer_separator, answer)

    # -- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        model_input: ModelInput | Float[Tensor, "batch pos d_model"],
        *,
        inputs: VLMInputs | Mapping[str, Tensor] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_type: Literal["logits", "loss"] = "logits",
    ) -> Tensor:
        """Logits for a batch.

        Args:
            model_input: VLMInputs, what a Hugging Face processor returns, or bare text tokens. With
                `start_at_layer` the residual stream [batch pos d_model] that enters that block.
            inputs: With `start_at_layer`: the inputs that give positions and mask.
            start_at_layer: Skip the embedding, the vision tower and all blocks below.
            stop_at_layer: Skip this block and all above, and return the residual stream.
            logits_to_keep: Compute logits only at the last so many positions, or at these
                positions (a tensor of indices); 0 for all.
            return_type: `loss` is the mean cross-entropy of the answer tokens, or of all text
                tokens where no answer is marked.

        Returns:
            [batch pos d_vocab]; [batch pos d_model] with `stop_at_layer`; a scalar for `loss`.

        Raises:
            ValueError: Inputs that don't fit (see `as_inputs`), a layer out of range, or a residual
                without `inputs`.
        """
        first = self._layer_index(start_at_layer, 0)
        last = self._layer_index(stop_at_layer, self.cfg.n_layers)
        if start_at_layer is None:
            known = self.as_inputs(model_input)
            resid = self.embed_inputs(known)
        else:
            if inputs is None or not isinstance(model_input, Tensor) or not model_input.is_floating_point():
                raise ValueError("start_at_layer takes a residual stream [batch pos d_model] and inputs=")
            known, resid = self.as_inputs(inputs), model_input
            if resid.shape[:2] != known.input_ids.shape:
                raise ValueError(
                    f"residual {tuple(resid.shape)} does not fit inputs {tuple(known.input_ids.shape)}"
                )
        resid = self.run_blocks(resid, self._context(known), first, last)
        if stop_at_layer is not None:
            return resid
        if return_type == "loss":
            return self._loss(self._logits(resid, 0), known)
        return self._logits(resid, logits_to_keep)

    def _layer_index(self, layer: int | None, default: int) -> int:
        if layer is None:
            return default
        index = layer + self.cfg.n_layers if layer < 0 else layer
        if not 0 <= index <= self.cfg.n_layers:
            raise ValueError(f"layer {layer} is not in 0 … {self.cfg.n_layers}")
        return index

    def embed_inputs(self, inputs: VLMInputs) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters block 0: text embedded, images encoded and merged in."""
        embeds = self.hook_text_embed(self.embed(inputs.input_ids))
        if inputs.pixel_values is not None:
            images = self.encode_images(inputs) if inputs.image_embeds is None else inputs.image_embeds
            if self.hook_image_embed.fwd_hooks:
                images = images.clone()  # a hook may edit in place what the inputs still hold
            images = self.hook_image_embed(images).to(embeds.dtype)
            embeds = embeds.masked_scatter(inputs.image_mask[..., None], images)
        return self.hook_embed(embeds)

    def _context(self, inputs: VLMInputs) -> AttentionContext:
        cos, sin = self.rotary(self.positions(inputs), self.cfg.dtype)
        mask = attention_mask(inputs.attention_mask.bool(), inputs.input_ids.shape[1])
        return AttentionContext(cos, sin, mask, causal=True)

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
        first: int = 0,
        last: int | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after blocks `first` … `last` − 1, with positions and mask of your own."""
        self._forwards += 1
        for block in self.blocks[first : self.cfg.n_layers if last is None else last]:
            resid = block(resid, context)
        return resid

    def next_token_logits(
        self, inputs: VLMInputs, said: Int[Tensor, "batch new"], kv_cache: KVCache | None
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits of the token that follows prompt and `said`.

        Args:
            inputs: The prompts (from `as_inputs`).
            said: New tokens so far.
            kv_cache: Holds prompt and all of `said` but its last token, and is extended; None
                computes the whole sequence, images too.
        """
        if kv_cache is None or said.shape[1] == 0:
            grown = inputs.extended(said)
            resid, context = self.embed_inputs(grown), replace(self._context(grown), kv_cache=kv_cache)
        else:
            resid = self.hook_embed(self.hook_text_embed(self.embed(said[:, -1:])))
            grown = inputs.extended(said)
            cos, sin = self.rotary(self.positions(grown)[..., -1:], self.cfg.dtype)
            mask = attention_mask(grown.attention_mask.bool(), 1)
            context = AttentionContext(cos, sin, mask, causal=True, kv_cache=kv_cache)
        return self._logits(self.run_blocks(resid, context, 0, self.cfg.n_layers), 1)[:, -1]

    def _logits(self, resid: Tensor, keep: int | Tensor) -> Tensor:
        if isinstance(keep, Tensor):
            resid = resid[:, keep]
        elif keep:
            resid = resid[:, -keep:]
        return self.unembed(self.ln_final(resid))

    def _loss(self, logits: Tensor, inputs: VLMInputs) -> Tensor:
        asked = inputs.answer_mask
        if asked is None:
            asked = inputs.token_groups["text"] & (inputs.attention_mask.cumsum(-1) > 1)
        asked = asked[:, 1:].to(logits.device)
        return F.cross_entropy(logits[:, :-1][asked], inputs.input_ids[:, 1:][asked])

    def generate(
        self,
        inputs: ModelInput,
        max_new_tokens: int = 24,
        return_type: Literal["text", "tokens"] = "text",
        use_kv_cache: bool = True,
    ) -> list[str] | Tensor:
        """Continue every row greedily; hooks are active at every step.

        Args:
            inputs: Prompts with their images.
            max_new_tokens: Stop a row after this many, or after an end-of-sequence token.
            return_type: `tokens` gives the new tokens [batch new], EOS kept, then padding.
            use_kv_cache: False computes everything anew at every step (same tokens, slower).

        Returns:
            Stripped strings without special tokens, or token ids.
        """
        tokens = generation.greedy(self, self.as_inputs(inputs), max_new_tokens, use_kv_cache)
        if return_type == "tokens":
            return tokens
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    @torch.no_grad()
    def log_probs(self, inputs: VLMInputs) -> Float[Tensor, " batch"]:
        """Log-probability of each row's answer (inputs prepared with `answers`), summed over tokens.

        Raises:
            ValueError: The inputs mark no answer.
        """
        known = self.as_inputs(inputs)
        if known.answer_mask is None:
            raise ValueError("inputs mark no answer: prepare(images, prompts, answers=[...])")
        longest = int((known.answer_mask.int().argmax(-1).min()).item())
        keep = torch.arange(longest - 1, known.input_ids.shape[1] - 1, device=self.cfg.device)
        logits = self(known, logits_to_keep=keep).float().log_softmax(-1)
        chosen = logits.gather(-1, known.input_ids[:, longest:, None])[..., 0]
        return (chosen * known.answer_mask[:, longest:]).sum(-1)

    # -- hooks -----------------------------------------------------------------------------------

    def check_hook_name(self, name: str) -> None:
        """Raise ValueError for a hook that does not exist, naming the nearest that do."""
        if name not in self.hook_dict:
            near = difflib.get_close_matches(name, self.hook_dict, n=3)
            raise ValueError(f"no hook {name!r}; nearest: {', '.join(near) or 'none'}")

    def _matching(self, names: NamesFilter) -> list[str]:
        if isinstance(names, str):
            self.check_hook_name(names)
            return [names]
        if callable(names):
            found = [name for name in self.hook_dict if names(name)]
            if not found:
                raise ValueError("the names filter matches no hook of this model")
            return found
        if names is None:
            return [name for name in self.hook_dict if not self._is_costly(name)]
        for name in names:
            self.check_hook_name(name)
        if not names:
            raise ValueError("the names filter is empty")
        return list(names)

    def _is_costly(self, name: str) -> bool:
        split = self.cfg.use_split_qkv_input and name.endswith("_input") and name.startswith("blocks.")
        return name.endswith(_COSTLY) and not split

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedVLM]:
        """Hooks for the runs inside the `with` block, as in TransformerLens, but never silent.

        Raises:
            ValueError: A name that does not exist, or a filter that matches nothing.
            RuntimeError: At the end: the model ran, but a hook asked for by name never did (a vision
                hook on text alone, a block below `start_at_layer`).
        """
        for names, _ in (*fwd_hooks, *bwd_hooks):
            self._matching(names)
        ran: set[str] = set()
        named = {names for names, _ in fwd_hooks if isinstance(names, str)}
        marks = [(name, lambda _, hook: ran.add(hook.name)) for name in named]
        before = self._forwards
        with super().hooks([*marks, *fwd_hooks], list(bwd_hooks), reset_hooks_end, clear_contexts):
            yield self
        if self._forwards > before and named - ran:
            raise RuntimeError(f"the model ran, but these hooks never did: {', '.join(sorted(named - ran))}")

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, **options: Any) -> None:
        """Add a lasting hook (see `reset_hooks`); an unknown name raises."""
        self._matching(name)
        super().add_hook(name, hook, **options)

    def run_with_cache(
        self,
        model_input: ModelInput | Tensor,
        *,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        **forward_options: Any,
    ) -> tuple[Tensor, ActivationCache]:
        """Run the model and keep activations.

        Args:
            model_input: As for `forward`.
            names_filter: A hook name, several, or a predicate. Default: every hook that runs, but
                `attn.hook_result` and the split inputs, which cost n_heads residual streams each.
            device: Where to keep the activations; default: where they are.
            remove_batch_dim: Drop the batch axis (of 1), and the vision tower's image axis where it is 1.
            incl_bwd: Also run backward (with `return_type="loss"`) and keep gradients as `*_grad`.
            pos_slice: Keep only these positions of the decoder's activations.
            reset_hooks_end, clear_contexts: As in TransformerLens.
            forward_options: Passed to `forward`.

        Returns:
            What `forward` returns, and the cache; tensors are detached.

        Raises:
            ValueError: An unknown name, a filter that matches nothing, or a batch to drop that is
                larger than 1.
        """
        names = self._matching(names_filter)
        store: dict[str, Tensor] = {}
        forward_hook, backward_hook = keeping_hooks(store, device, pos_slice, remove_batch_dim)
        asked = names_filter is not None and not callable(names_filter)
        fwd: list[Hook] = [(name, forward_hook) for name in names]
        bwd: list[Hook] = [(name, backward_hook) for name in names] if incl_bwd else []
        hooks = self.hooks if asked else super().hooks
        with hooks(fwd, bwd, reset_hooks_end, clear_contexts):
            out = self(model_input, **forward_options)
            if incl_bwd:
                out.backward()
        return out, ActivationCache(store, self, has_batch_dim=not remove_batch_dim)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether every pass makes `attn.hook_{q,k,v}_input` (a hook on one of them suffices)."""
        self.cfg = replace(self.cfg, use_split_qkv_input=use_split_qkv_input)
        for block in self.blocks:
            block.attn.use_split_qkv_input = use_split_qkv_input

    # -- device ----------------------------------------------------------------------------------

    def _apply(self, fn: Callable, recurse: bool = True) -> HookedVLM:
        moved = super()._apply(fn, recurse)
        where = self.embed.weight
        self.cfg = replace(self.cfg, device=where.device, dtype=where.dtype)
        return moved

    # -- tokens ----------------------------------------------------------------------------------

    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool = True) -> Tensor:
        """Ids of plain text [batch pos], without chat format; several texts are left-padded."""
        return self._encode(text, prepend_bos)[0]

    def _encode(self, text: str | Sequence[str], prepend_bos: bool = True) -> tuple[Tensor, Tensor]:
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no text")
        ids = [self.tokenizer(t, add_special_tokens=prepend_bos).input_ids for t in texts]
        length = max(map(len, ids))
        padded = [[self.cfg.pad_token_id] * (length - len(row)) + row for row in ids]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in ids]
        return torch.tensor(padded, device=self.cfg.device), torch.tensor(mask, device=self.cfg.device)

    def to_single_token(self, text: str) -> int:
        """The id of text that is one token.

        Raises:
            ValueError: It is several.
        """
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens: {self.tokenizer.convert_ids_to_tokens(ids)}")
        return ids[0]

    def to_str_tokens(self, tokens: str | Tensor | Sequence[int], prepend_bos: bool = True) -> list[str]:
        """Each token of one text, or of one row of ids, as a string."""
        if isinstance(tokens, str):
            tokens = self.to_tokens(tokens, prepend_bos)
        ids = torch.as_tensor(tokens).flatten().tolist()
        return self.tokenizer.convert_ids_to_tokens(ids)

    def to_string(self, tokens: Tensor) -> str | list[str]:
        """Decode ids [pos] to a string, or [batch pos] to a list of strings."""
        return self.tokenizer.decode(tokens) if tokens.ndim == 1 else self.tokenizer.batch_decode(tokens)

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*shape d_model"]:
        """Directions whose dot product with `resid / ln_final scale` is the token's logit.

        The final norm's weight is folded in, since `ActivationCache.apply_ln_to_stack` divides by
        the scale and leaves out the weight.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        index = torch.as_tensor(tokens, device=self.cfg.device)
        return self.unembed.linear.weight[index] * self.ln_final.weight

    # -- weights ---------------------------------------------------------------------------------

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases of all blocks below `layer` (and of its attention, if mlp_input)."""
        total = torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=self.cfg.dtype)
        for i, block in enumerate(self.blocks[: layer + mlp_input]):
            total = total + block.attn.b_O
            if include_mlp_biases and i < layer:
                total = total + block.mlp.b_out
        return total

    def tl_parameters(self) -> tl_weights.NamedWeights:
        """Weights by TransformerLens's names, keys and values by query head (for `SVDInterpreter`)."""
        return tl_weights.tl_parameters(self)

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_Kᵀ of every query head, [layer head d_model d_model]."""
        return tl_weights.qk(self)

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every query head, [layer head d_model d_model]."""
        return tl_weights.ov(self)

    def _stack(self, part: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights, stacked on demand."""
        return self._stack("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Key weights, stacked on demand."""
        return self._stack("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Value weights, stacked on demand."""
        return self._stack("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights, stacked on demand."""
        return self._stack("attn", "W_O")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Gate weights, stacked on demand."""
        return self._stack("mlp", "W_gate")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Linear input weights of the neurons, stacked on demand."""
        return self._stack("mlp", "W_in")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """Output weights of the neurons, stacked on demand."""
        return self._stack("mlp", "W_out")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings."""
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding (a view)."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Zeros: there is no unembedding bias."""
        return self.unembed.b_U


def token_names(model: HookedVLM, ids: Sequence[int]) -> list[str]:
    """Tokens as the tokenizer writes them; `[id]` for rows of W_U that no token has."""
    names = model.tokenizer.convert_ids_to_tokens(list(ids))
    return [name if name is not None else f"[{i}]" for i, name in zip(ids, names, strict=True)]
