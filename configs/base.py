"""Every key that an experiment has, with its default. Not an experiment: the files beside it are."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.objective = "vrpo"  # "pretrain", "sft" or "vrpo"
    c.init_from = ""  # Hugging Face style folder or a checkpoint of ours; "": random parameters
    c.seed = 0
    c.num_steps = 0  # 0: as many as `epochs` passes over the data take
    c.epochs = 1

    c.model = ml_collections.ConfigDict()
    c.model.arch = {}  # keys of a published config.json: needed without init_from, checked against it otherwise
    c.model.dtype = "float32"  # of activations
    c.model.param_dtype = "float32"
    c.model.remat = "none"  # "none", "dots" or "full": what a layer keeps for its backward pass
    c.model.attention = "auto"
    c.model.unroll = 1  # layers compiled one by one: all of a small model's run faster, one compiles the quickest
    c.model.logps_chunk = (
        8192  # entries of the vocabulary whose logits are held at a time, for all positions
    )

    c.data = ml_collections.ConfigDict()
    c.data.train = ""  # jsonl:GLOB, tfds:NAME_OR_DIR, python:module:function?key=value
    c.data.heldout = ""  # another source; "": the share `holdout` of the train source
    c.data.holdout = 0.0
    c.data.tokenizer = ""  # a folder, tokenizer.json or SentencePiece model; "": beside init_from
    c.data.template = "chat"  # "chat" or "plain"
    c.data.row_length = 4096
    c.data.batch_rows = 16  # rows of all devices in one step
    c.data.append_eos = True
    c.data.answer_multiple = (
        1  # sft: pad answers with EOS to a multiple; row_length: the published form
    )
    c.data.too_long = "drop"  # or "truncate"
    c.data.bad_records = "stop"  # or "skip"
    c.data.limit = 0  # records of the source to read, 0: all
    c.data.cache_dir = ""  # of packed rows; "": WORKDIR/data

    c.denoising = ml_collections.ConfigDict()  # pretrain and sft
    c.denoising.n_t = 1
    c.denoising.masks = "bernoulli"
    c.denoising.eps = 1e-3
    c.denoising.crop_probability = 0.0  # pretrain: share of rows cut to a random length
    c.denoising.mc_chunk = 0

    c.vrpo = ml_collections.ConfigDict()
    c.vrpo.beta = 0.2
    c.vrpo.kind = "sigmoid"  # "sigmoid", "ipo", "hinge" or "robust"
    c.vrpo.label_smoothing = 0.0
    c.vrpo.sft_weight = 0.05
    c.vrpo.n_t = 8
    c.vrpo.n_yt = 1
    c.vrpo.times = "iid"  # llada_jax/elbo.md says what these schemes are worth
    c.vrpo.masks = "exact"
    c.vrpo.weights = "plain"
    c.vrpo.pseudo_count = (
        0.0  # of weights="leave_one_out" or "balanced": how near they stay to "plain"
    )
    c.vrpo.share_in_pair = "nothing"  # or "times", "masks": what winner and loser have in common
    c.vrpo.share_noise = True
    c.vrpo.mc_chunk = 0  # draws at a time; 0: all
    c.vrpo.reference = (
        "model"  # its parameters beside the policy's, or "cached": its terms computed beforehand
    )
    c.vrpo.reference_from = ""  # "": init_from
    c.vrpo.reference_dtype = ""  # "": param_dtype

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.peak = 1e-3  # learning rate after warm-up
    c.optimizer.warmup_steps = 100
    c.optimizer.schedule = (
        "cosine"  # after warm-up; or "constant", down in the last tenth of the steps
    )
    c.optimizer.end_fraction = 0.0  # of the peak, at the last step
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0  # 0: no clipping
    c.optimizer.accumulate = 1  # parts of a batch, one after the other

    c.parallelism = "mesh"  # jit over the mesh, or "pmap": parameters on every device, rows split, mesh.data alone
    c.mesh = ml_collections.ConfigDict()  # -1: what is left
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 1000  # steps; always at the end and when stopped
    c.checkpoint.keep = 3

    c.eval = ml_collections.ConfigDict()
    c.eval.every = 0  # steps; 0: at the start and the end only
    c.eval.batch_rows = 0  # 0: as many as go through the model together in training
    c.eval.n_t = 0  # draws for the held-out metrics, noise shared; 0: 8
    c.eval.variance_repeats = (
        0  # vrpo: score variance, V_t, V_yt by >= 3 repeats of 2 n + 4 forward passes; 0: off
    )
    c.eval.seconds_between_lines = 10.0  # progress, where there is no terminal

    c.solve = ml_collections.ConfigDict()  # generate for held-out prompts and score the responses
    c.solve.prompts = ""  # a source; "": off
    c.solve.scorer = ""  # module:function, (record, response) -> float
    c.solve.limit = 0  # prompts, 0: all
    c.solve.gen_length = 128
    c.solve.steps = 128
    c.solve.block_length = 32
    c.solve.batch_size = 50
    return c.lock()  # so that a misspelt key in a config that starts from here is an error
