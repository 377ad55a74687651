"""Nothing lost: what stands on the local disk, what is published, and how a consumer takes it.

From the bottom up: `tensors` writes safetensors files, `store` knows how bytes become durable here and at a URL,
`manifest` is the form of everything that is stored as JSON. `run_directory` owns a run, `journal` keeps its
decisions, `commits` its resumable state. `exports` builds what is published and publishes it, `retention` says what
may go, `pull` is the reader's side. Import the module that you need: this package itself imports nothing, so that
`pull` starts quickly and without torch.
"""
