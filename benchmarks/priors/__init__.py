"""What priors differ in: likelihoods, samples, orders and passes, at equal tokens and time."""
