//! vhost: being built.
