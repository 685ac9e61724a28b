"""The Flower ServerApp: the experiment's server side, its messages carried by Flower's grid."""
