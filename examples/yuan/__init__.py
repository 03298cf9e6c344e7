"""One language model, in plain PyTorch and of transformers, under every trainer of the harness, from one configuration.

    python -m examples.yuan                                    # both models, every trainer that is installed, 2 ranks
    python -m examples.yuan --set trainer.names=autopart,FSDP2 --set model.kind=native
    python -m examples.yuan --config mine.toml --set trainer.ranks=4

`config.toml` has three tables: [model], [data] and [trainer]. `config.py` reads it, `data.py` makes batches of [data],
`model.py` a model of [model], and `trainers.py` a step of [trainer]; none of them knows the others' settings.
"""
