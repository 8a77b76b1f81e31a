"""Whether each unkindness of the local cloud is one: commit 0abccd6 must fail of it, the present code not."""
