"""The method: coordinates of weights, INRs, and hypernetworks that generate networks."""
