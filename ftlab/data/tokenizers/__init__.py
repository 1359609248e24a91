"""Text to token ids and back: SentencePiece models, everything that Hugging Face's ``tokenizers`` runs, plain bytes.

``save`` writes a folder that ``transformers.AutoTokenizer`` opens with the same ids.
"""

from ftlab.data.tokenizers.base import Tokenizer
from ftlab.data.tokenizers.byte import ByteTokenizer
from ftlab.data.tokenizers.huggingface import HuggingFaceTokenizer
from ftlab.data.tokenizers.sentencepiece_model import TINY_MODEL, SentencePieceTokenizer

__all__ = ["TINY_MODEL", "ByteTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer", "Tokenizer"]
