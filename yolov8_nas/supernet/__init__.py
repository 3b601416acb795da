"""The weight-sharing supernet: elastic modules, training, derivation of stock networks."""
