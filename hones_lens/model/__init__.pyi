from .answers import (
    Answer as Answer,
    at_positions as at_positions,
    summed_log_probs as summed_log_probs,
)
from .caching import VLMCache as VLMCache
from .choices import require_choice as require_choice
from .config import (
    ModelSettings as ModelSettings,
    VLMConfig as VLMConfig,
    all_settings as all_settings,
    checkpoint_path as checkpoint_path,
    find_settings as find_settings,
)
from .decoding import Decoding as Decoding
from .families import load_family as load_family
from .generation import decode as decode
from .hooked_vlm import HookedVLM as HookedVLM
from .inputs import ImageText as ImageText, ModelInput as ModelInput, Region as Region, VLMInputs as VLMInputs
from .iterables import takes_iterables as takes_iterables
from .known import (
    known_config as known_config,
    known_settings as known_settings,
    model_without_weights as model_without_weights,
    processor_options_of as processor_options_of,
)
from .layout import ImageLayout as ImageLayout
from .loadable import check_device as check_device
from .loading import (
    hook_hf_model as hook_hf_model,
    load_hf_model as load_hf_model,
    load_model as load_model,
    resolve as resolve,
)
from .memory import (
    Allowance as Allowance,
    bounded_by as bounded_by,
    free_bytes as free_bytes,
    is_out_of_memory as is_out_of_memory,
)
from .names import did_you_mean as did_you_mean
from .nn.context import (
    AttentionContext as AttentionContext,
    KVCache as KVCache,
    attention_mask as attention_mask,
)
from .nn.mlp import GatedMLP as GatedMLP
from .nn.norm import RMSNorm as RMSNorm
from .nn.placed import weights_of as weights_of
from .nn.rotary import rotate as rotate
from .pictures import (
    PictureLike as PictureLike,
    Pictures as Pictures,
    open_image as open_image,
    open_images as open_images,
    opened_image as opened_image,
    read_image as read_image,
)
from .post_norms import (
    PARTS as PARTS,
    Part as Part,
    post_norm as post_norm,
    scale_hook as scale_hook,
    weighted as weighted,
)
from .prompting import prompt_lengths as prompt_lengths
from .qwen_like import QwenProcessor as QwenProcessor
from .tiles import n_tiles as n_tiles
from .tiling import tiling_of as tiling_of
from .tokens import (
    bare_text_ids as bare_text_ids,
    leading_blanks as leading_blanks,
    pad_left as pad_left,
    token_names as token_names,
)
from .typed import bias_or_none as bias_or_none, to_list as to_list
from .widened import in_float32 as in_float32
