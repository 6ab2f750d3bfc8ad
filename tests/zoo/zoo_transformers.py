"""All models of transformers in the zoo, as small as their configurations let them be."""

from zoo_decoders import DECODERS
from zoo_encoder_decoders import ENCODER_DECODERS
from zoo_encoders import ENCODERS
from zoo_pictures import PICTURES
from zoo_pictures_and_texts import PICTURES_AND_TEXTS
from zoo_sounds import SERIES, SOUNDS

CASES = [
    *DECODERS,
    *ENCODERS,
    *ENCODER_DECODERS,
    *PICTURES,
    *PICTURES_AND_TEXTS,
    *SOUNDS,
    *SERIES,
]

# Those that are tried on two processes, in two stages of large leaves.
ON_RANKS = (
    "llama",
    "llama, checkpointed",
    "qwen3",
    "gemma2",
    "gpt2",
    "mixtral",
    "mixtral, eager experts",
    "deepseek-v3",
    "mamba",
    "bert",
    "albert",
    "t5",
    "bart",
    "whisper",
    "vit",
    "swin",
    "resnet",
    "clip",
    "wav2vec2, ctc",
    "llava",
    "perceiver",
)
