"""Saved SAEs of other tools and of Legato, read and written.

detect.py               Find the format of a saved SAE by its content, and read it.
dictionary_learning.py  Runs of dictionary_learning 0.1: `trainer_<i>/{config.json, ae.pt, checkpoints/ae_<step>.pt}`,
                        plain state dicts.
hook_names.py           Names of places in the words of other tools, as Legato's layer and site.
hub_download.py         The files of one SAE in a hub repository, brought into the hub client's cache.
published.py            Published SAEs that are files of weights with the rest in their names: Gemma Scope 1 and
                        2, Llama Scope, Qwen-Scope, Goodfire.
saelens.py              SAELens folders: `cfg.json` + `sae_weights.safetensors`, as SAELens 6.54 saves and opens them.
saelens_training.py     SAELens training saves: they have a threshold still to come, and a normaliser that is not
                        folded in yet.
safetensors_file.py     One safetensors file: an SAE's tensors by SAELens' names, what it is beside them as JSON in
                        the file's header.
sparsify.py             sparsify folders: `<run>/<hookpoint>/{cfg.json, sae.safetensors}`, the run's config.json
                        beside the hookpoints.
weights.py              An SAE as a file holds it, whatever the format, and what every format is checked for.
"""
