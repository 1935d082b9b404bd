"""Talks with a model in a terminal, and shows how each answer is un-masked.

    python -m llada_jax.chat --model=DIR

Without a terminal it reads one message a line from standard input, and prints each whole answer.
"""

import argparse
import json
import pathlib
import sys

from llada_jax import cli
from llada_jax.chat.screen import Plain, Terminal, open_screen
from llada_jax.chat.session import Session
from llada_jax.checkpoints import loading
from llada_jax.files import write_whole
from llada_jax.sampling.flags import add_flags

COMMANDS = {
    "/set NAME VALUE": "change a setting; several: /set NAME VALUE NAME VALUE",
    "/show": "the settings and the length of the conversation",
    "/new": "forget the conversation",
    "/undo": "forget the last turn",
    "/save FILE": "write the conversation and its settings as JSON",
    "/help": "this",
    "/quit": "leave, as does Ctrl-D",
}
HELP = (
    "\n".join(f"{usage:17}{text}" for usage, text in COMMANDS.items())
    + """
Ctrl-C stops an answer. A message may begin with / after a space.
The value "none" is the default of a setting.
Colours are the confidence at the commit: green from 0.9, yellow from 0.5, red.
New tokens are bold, dots are masks."""
)


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("chat", __doc__)
    loading.add_flags(parser)
    parser.add_argument(
        "--template",
        choices=("chat", "plain"),
        default="chat",
        help="plain: BOS and the text, a transcript from the second turn on",
    )
    parser.add_argument("--seed", type=int, default=0)
    add_flags(parser)
    parser.set_defaults(stop_at_eos=None)  # on, if the model has an EOS that it may write
    return parser


def main(args: argparse.Namespace):
    """Runs the command."""
    screen = open_screen()
    model = loading.open_model(args.model, args.dtype, args.quantize)
    special = loading.special_ids(*model[1:])
    if args.stop_at_eos is None:
        args.stop_at_eos = special["eos_id"] is not None and not args.logits_eos_inf
    session = Session(model, special, args)
    screen.say(f"{args.model} takes {session.most} tokens. /help lists the commands.")
    while True:
        try:
            line = screen.read()
            if line.split() == ["/quit"]:
                return
            if line.startswith("/"):
                screen.say(_command(session, args, *line.split()))
            elif line.strip():
                _turn(session, screen, line.strip())
        except EOFError:
            return
        except (ValueError, OSError) as error:
            screen.say(f"error: {cli.one_line(error)}")
        except KeyboardInterrupt:
            if isinstance(screen, Plain):
                raise
            screen.say("\nCtrl-D or /quit leaves")


def _turn(session: Session, screen: Plain | Terminal, text: str):
    """Asks, shows the answer, and adds both to the conversation."""
    compiles, frames = session.ask(text, screen.every)
    frame, interrupted = screen.show(frames, compiles)
    if frame is None or (interrupted and not frame.text):
        screen.say("stopped: nothing is written, the message is forgotten")
        return
    session.add(text, frame.text)
    if interrupted:
        screen.say("stopped: what is written is kept; /undo forgets it")
    elif not frame.text:
        screen.say("the answer is empty")


def _command(session: Session, args: argparse.Namespace, name: str, *words: str) -> str:
    """Does what a line that begins with / says; returns what there is to say about it."""
    usage = {u.split()[0]: u for u in COMMANDS}
    if name not in usage:
        raise ValueError(f"there is no command {name}; /help lists them")
    if name != "/set" and len(words) != len(usage[name].split()) - 1:
        raise ValueError(f"write {usage[name]}")
    if name == "/set":
        return session.set(words)
    if name == "/show":
        settings = "\n".join(f"{k:24}{v}" for k, v in session.settings.items())
        used = len(session.prompt) if session.messages else 0
        return f"{settings}\n{len(session.messages) // 2} turns, {used} of {session.most} tokens"
    if name == "/new":
        session.messages.clear()
        return "a new conversation"
    if name == "/undo":
        return f"forgotten: {session.undo()}"
    if name == "/save":
        return _save(session, args, words[0])
    return HELP


def _save(session: Session, args: argparse.Namespace, name: str) -> str:
    """Writes the conversation to a file that does not exist."""
    path = pathlib.Path(name).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists: give another file")
    about = {key: getattr(args, key) for key in ("model", "template", "dtype", "quantize", "seed")}
    content = {**about, "settings": session.settings, "messages": session.messages}
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return f"wrote {path}"


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
