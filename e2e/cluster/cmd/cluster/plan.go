// The plan of the cluster: names and addresses. Everything else asks here.
//
//	this machine | 127.0.0.1:PORT ---(the listening socket is inherited)--+
//	-------------+------------------------------------------------------ | --------------
//	outer network namespace, no uplink                                    |
//	    control: etcd, kube-apiserver, -controller-manager, -scheduler  <-+
//	    bridge cluster0, 172.30.0.1/24
//	       |                            |
//	    node-1, 172.30.0.11          node-2, 172.30.0.12      namespaces of their own; containerd, kubelet,
//	    pods 10.244.1.0/24           pods 10.244.2.0/24       kube-proxy, and the pods
package main

import "fmt"

const (
	controlIP   = "172.30.0.1"
	networkBits = "24"
	podRange    = "10.244.0.0/16"
	// The first address of the range is the API server's, by Kubernetes' rule.
	serviceRange  = "10.96.0.0/16"
	apiServiceIP  = "10.96.0.1"
	dnsServiceIP  = "10.96.0.10"
	clusterDomain = "cluster.local"
	apiPort       = "6443"
	etcdURL       = "http://127.0.0.1:2379"
)

type node struct {
	name    string
	ip      string
	pods    string // its part of podRange
	gateway string // of its pods
	link    string // the end of its cable at the bridge
}

var nodes = []node{makeNode(1), makeNode(2)}

func makeNode(number int) node {
	return node{
		name:    fmt.Sprintf("node-%d", number),
		ip:      fmt.Sprintf("172.30.0.%d", 10+number),
		pods:    fmt.Sprintf("10.244.%d.0/24", number),
		gateway: fmt.Sprintf("10.244.%d.1", number),
		link:    fmt.Sprintf("to-node-%d", number),
	}
}

func nodeNamed(name string) (node, error) {
	for _, known := range nodes {
		if known.name == name {
			return known, nil
		}
	}
	return node{}, fmt.Errorf("no node %q here", name)
}
