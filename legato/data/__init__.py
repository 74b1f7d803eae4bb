"""Text, tokens, the language model, and its activations on disk.

activations.py     Activations: their record, sources that give them in batches, and the normaliser of training.
documents.py       Documents of a corpus: the packaged demo articles, local files and folders, hub data sets.
fast_kernels.py    The memory-bound steps of a decoder layer, each in one pass over the data (numba, one thread, no
                   GIL).
fast_layers.py     Decoder layers of the Llama, Gemma, GPT-2 and GPT-NeoX families on the CPU, about twice as fast as
                   transformers.
find_site.py       Find the place that a site's name means in a language model, by what a layer computes on a few
                   tokens.
gguf.py            GGUF weights, such as the packaged demo model, converted once into the cache.
harvest.py         Compute the activations of a token set once and keep them in a store.
language_model.py  Any Hugging Face causal language model, frozen: read it at one layer, splice back into it, unembed.
model_files.py     Find a language model by its name, and choose the device and dtype to load it.
sites.py           Places in a language model that can be read and replaced, through hooks on its modules.
store.py           A store of activations on the disk, or at a URL: read row by row, and written shard by shard.
store_manifest.py  Layout of a store on the disk: safetensors shards of whole rows, and a manifest with their SHA-256.
tokens.py          Rows of tokens with a mask and document numbers, packed so that no text is lost or repeated.
wikitext.py        Conversion of MediaWiki source to plain prose, for the packaged demo corpus.
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
