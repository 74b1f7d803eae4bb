"""Live bridges to other tools. Each module needs optional packages, so none is imported here.

hub.py               SAEs on the Hugging Face hub: `push_to_hub` with a model card written from the metrics,
                     `from_pretrained` back.
saebench_evals.py    Start sae-bench's evaluations other than `core`, after a check of what each needs.
saebench_file.py     SAEBench 0.6.0 result files: `<release>_<arm>_eval_results.json` of its `core` evaluation.
saebench_wrapper.py  Legato's SAEs inside sae-bench 0.6, which runs unmodified: a BaseSAE, and its `core` on any model
                     and text.
saelens.py           SAELens' side of Legato's folders: `import legato.interop.saelens`, and `SAE.load_from_disk` opens
                     them all.
"""
