"""DroidSpeak inside vLLM: requests whose KV cache of a shared context comes from another model's, by a plan of their own."""
