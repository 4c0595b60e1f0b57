"""The Space of this metric: `evaluate`'s form that computes it."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

if __name__ == "__main__":
    import gradio  # pyright: ignore[reportMissingImports] - every gradio Space has it

    # evaluate 0.4.6 asks for two modules that gradio 4 dissolved; gone when it no longer does:
    # https://github.com/huggingface/evaluate/issues/602
    gradio.inputs = gradio.outputs = gradio
    launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("stereoset.py"))))
