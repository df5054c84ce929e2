"""Files: adapters in PEFT's format, in a folder or on the Hub, and checkpoints of base models.

`checkpoint` reads, checks and writes adapters, `written_config` is the config beside them, and `given` finds their
values in a state dict. `apart` makes adapters of stacked experts of those that an old file has for each. `folder`
replaces a folder's files at once, or in turn where it must (`pinned`), and `disk` waits until they are stored. `hub`
downloads and uploads, `model_card` writes the README.md of an adapter. `base` is a base model's checkpoint, `shards`
reads and writes its safetensors files by pieces, `pickled` reads torch's own files as if they were such, and `staging`
writes a large folder that whoever was killed goes on with.
"""
