"""The PEFT method GRADIEND: a decoded update as an adapter, dialled at load time."""
