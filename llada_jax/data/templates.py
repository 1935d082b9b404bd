"""Prompt templates: turn prompts (strings or chat messages) into token ids."""

from llada_jax.tokenizer import Tokenizer


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """Returns the messages of a prompt; a string becomes one message of the user."""
    return [{"role": "user", "content": prompt.strip()}] if isinstance(prompt, str) else prompt


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict], template: str) -> list[int]:
    r"""Returns the ids of a prompt, up to the point where the response begins.

    template "chat": the tokenizer's chat template; a string counts as one message of the user.
    template "plain": bos (if the tokenizer has one) and the text. Messages are written as an
    HH-RLHF transcript (`\n\nHuman: ...\n\nAssistant: `).
    """
    if template == "chat":
        return tokenizer.chat_prompt(as_messages(prompt))
    if not isinstance(prompt, str):
        roles = {"user": "Human", "assistant": "Assistant"}
        turns = [f"\n\n{roles.get(m['role'], m['role'].title())}: {m['content']}" for m in prompt]
        prompt = "".join(turns) + "\n\nAssistant: "
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
