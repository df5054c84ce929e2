"""Files: adapters in PEFT's format, in a folder or on the Hub.

`checkpoint` reads, checks and writes adapters, `folder` replaces a folder's files at once, `hub` downloads and uploads,
`model_card` writes the README.md of an adapter.
"""
