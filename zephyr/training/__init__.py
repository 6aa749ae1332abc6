"""An optimizer step: the task, the forms of AdamW, the schedule of its learning rate."""
