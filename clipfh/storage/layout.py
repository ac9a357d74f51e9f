"""Names of the files and folders that commands leave behind, each written down here and nowhere else."""

# A catalogue. While it is written it bears the suffix `.partial`, and holds its plan.
CATALOGUE, PLAN = "catalogue.json", "plan.json"
AUDIT, AUDIT_PAGE, WITHOUT = "audit.json", "audit.html", "without.txt"

# A run. `checkpoints/` belongs to Ray Train; its snapshot lists the checkpoints that are whole.
RUN, EXPERIMENT = "run.json", "experiment.json"
REPORTS, STREAM = "metrics.jsonl", "stream.jsonl"
CHECKPOINTS, SNAPSHOT = "checkpoints", "checkpoint_manager_snapshot.json"
FREED = "freed.json"
"""What is left of a run that is over and whose checkpoints were not all kept: `step`, of the last one, and `kept`, the
name of the one whose weights are kept, or ''."""
TENSORBOARD, TRACK = "tensorboard", "track.json"

# A checkpoint, beside `EXPERIMENT` and `METRICS`
ARCHITECTURE = "architecture.json"
RAW_WEIGHTS, AVERAGE_WEIGHTS, TRAINING_STATE = "model.safetensors", "ema.safetensors", "training.pt"

# An evaluation
METRICS, PREDICTIONS, QUERIES = "metrics.json", "predictions.parquet", "queries.parquet"
EVALUATION, EMBEDDINGS, PROMPTS = "evaluation.json", "embeddings.parquet", "prompts.parquet"
BESIDE, BEFORE, AFTER = "beside", "before", "after"
"""Names for other catalogues: each has a folder in `beside/`, which holds two evaluations."""

# A sweep. Each folder below `trials/` and `final/` is a run's, each below `test/` an evaluation's, `best/` an export.
SWEEP, SWEEP_INPUTS, STUDY, LEADERBOARD = "sweep.yaml", "sweep.json", "study.journal", "leaderboard.csv"
RACE, SOUP = "race.json", "soup.json"
TRIALS, FINAL, TEST, BEST, TUNE = "trials", "final", "test", "best", "tune"
SUMMARY, REPORT = "summary.json", "report.html"

# An export, beside `EXPERIMENT`: names that open_clip and Hugging Face look for, and a folder for ONNX
EXPORTED_WEIGHTS, OPEN_CLIP_CONFIG, CARD = "open_clip_model.safetensors", "open_clip_config.json", "README.md"
OPEN_CLIP_WEIGHTS = (
    EXPORTED_WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Files of weights of a model's folder, in open_clip's order of preference"""
READ_PHOTO, START = "preprocess.py", "start.json"
ONNX, IMAGE_ONNX, TEXT_ONNX, PREPROCESSOR = "onnx", "image.onnx", "text.onnx", "preprocessor_config.json"
