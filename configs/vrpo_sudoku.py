"""The quickstart: VRPO on the shipped 4x4 Sudoku model, with preference pairs from its own samples.

    python -m llada_jax.train --config=configs/vrpo_sudoku.py --workdir=runs/vrpo_sudoku

TIMES
"""

from configs import sft_sudoku


def get_config():
    c = sft_sudoku.get_config()
    c.objective = "vrpo"
    c.init_from = str(sft_sudoku.SUDOKU)
    c.model.arch = {}
    c.data.tokenizer = ""
    c.data.train = f"jsonl:{sft_sudoku.SUDOKU / 'pairs.jsonl.gz'}"
    c.data.holdout = 0.1
    c.data.row_length = 66  # one pair: twice bos, puzzle and answer
    c.data.batch_rows = 32
    c.num_steps = 100
    c.vrpo.beta = 0.2
    c.vrpo.n_t = 8
    c.vrpo.mc_chunk = 0
    c.optimizer.peak = 5e-4
    c.optimizer.warmup_steps = 10
    c.optimizer.weight_decay = 0.01
    c.eval.batch_rows = 32
    return c
