"""Files: adapters in PEFT's format, in a folder or on the Hub.

`checkpoint` reads, checks and writes adapters, `given` finds their values in a state dict. `folder` replaces a folder's
files at once, or in turn where it must (`pinned`), and `disk` waits until they are stored. `hub` downloads and uploads,
`model_card` writes the README.md of an adapter.
"""
