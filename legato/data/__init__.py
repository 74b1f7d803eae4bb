"""From text to tokens, through the language model, to activations on disk.

activations.py     Activations: the record they travel in, what gives them out in batches, and the scale that
                   training sees them in.
documents.py       Corpora -> documents: the packaged demo articles, local files and folders, hub data sets.
fast_kernels.py    The memory-bound steps of a decoder layer, each in one pass over the data (numba, one thread,
                   no GIL).
fast_layers.py     Decoder layers of the Llama, Gemma, GPT-2 and GPT-NeoX families on the CPU, about twice as
                   fast as transformers' own.
gguf.py            GGUF weights, and the packaged demo model among them, converted once into the cache.
harvest.py         Harvest: the activations of a token set, computed once and kept in a store.
hub_datasets.py    Data sets of a hub, streamed record by record; a connection that breaks is taken up again.
language_model.py  Any Hugging Face causal language model, frozen: read it at one layer, splice back into it,
                   unembed.
model_files.py     Finding and opening a language model: where its name leads, its device and dtype.
store.py           A store of activations on the disk, or at a URL: read row by row, and written shard by shard.
store_manifest.py  How a store of activations lies on the disk: safetensors shards of whole rows, and a manifest
                   with their SHA-256.
tokens.py          Documents -> rows of tokens with a mask and a document number, packed so that no text is lost
                   or repeated.
wikitext.py        MediaWiki source -> plain prose, for the packaged demo corpus.
"""

from legato.data.activations import ActivationBatch, ActivationStream, Normaliser
from legato.data.documents import load_documents, split_held_out
from legato.data.harvest import harvest
from legato.data.language_model import LanguageModel
from legato.data.store import ActivationStore
from legato.data.tokens import TokenSet, tokenise

__all__ = [
    "ActivationBatch",
    "ActivationStore",
    "ActivationStream",
    "LanguageModel",
    "Normaliser",
    "TokenSet",
    "harvest",
    "load_documents",
    "split_held_out",
    "tokenise",
]
