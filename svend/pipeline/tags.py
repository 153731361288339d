"""Tags of runs that more than one part of the pipeline reads or writes."""

# Of a ladder's own run; of a rung's, with the ladder's name, the rung, and how it compares with its
# prediction; of a run that only tries a rung's learning rate.
LADDER_NAME_TAG = "svend.ladder.name"
LADDER_TAG, RUNG_TAG, TREND_TAG = "svend.ladder", "svend.ladder.rung", "svend.ladder.verdict"
STRESS_TAG = "svend.ladder.stress"
# The run of the scale below, and of the sweep that found the hyperparameters.
PARENT_SCALE_TAG, SWEEP_TAG = "svend.parent_scale_run_id", "svend.hparams.run_id"
# The description on a run's page, in Markdown.
NOTE_TAG = "mlflow.note.content"
