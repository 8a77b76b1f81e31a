"""What our processes say to each other: one typed struct a message, used at both ends.

    decoding   JSON to a struct, with an error that names the field
    hot_set    autoscaler ─► loadbalancer    GET and PUT /hot
    busy       loadbalancer ─► autoscaler    POST /busy
    leases     client ─► loadbalancer        POST /route, POST /done
    reports    instance ─► both              POST /ready, POST /report, and the answers of its auth_server
    operator   operator ─► autoscaler        PUT /manage, PUT /policy

Between our own processes unknown fields are ignored, because two versions may meet for a minute; what clients
and operators send is refused with an unknown field. remote/ and fleet_client/ import nothing of this: a test
holds the JSON that they make and read against these structs.
"""
