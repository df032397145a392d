"""How long training, sampling and data take, beside others where there are any."""
