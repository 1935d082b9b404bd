"""Prompts: strings or chat messages, to token ids."""

from llada_jax.tokenizer import Tokenizer


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A string is one message of the user."""
    return [{"role": "user", "content": prompt.strip()}] if isinstance(prompt, str) else prompt


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict], template: str) -> list[int]:
    """Ids of a prompt up to where the response begins.

    "chat": the tokenizer's chat template (a string is one message of the user). "plain": bos, where the tokenizer has
    one, and the text; messages are written as HH-RLHF transcripts (`\n\nHuman: ...\n\nAssistant: `).
    """
    if template == "chat":
        return tokenizer.chat_prompt(as_messages(prompt))
    if not isinstance(prompt, str):
        roles = {"user": "Human", "assistant": "Assistant"}
        turns = [f"\n\n{roles.get(m['role'], m['role'].title())}: {m['content']}" for m in prompt]
        prompt = "".join(turns) + "\n\nAssistant: "
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
