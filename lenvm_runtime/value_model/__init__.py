"""A separate LenVM in the SGLang process: a second model on the served model's slots that scores candidate tokens."""
