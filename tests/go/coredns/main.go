// The DNS server of a Kubernetes cluster: CoreDNS with the plugins that one's usual configuration names, and no others.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
)

func main() {
	// Plugins answer in this order.
	dnsserver.Directives = []string{"reload", "cancel", "health", "ready", "errors", "cache", "kubernetes"}
	coremain.Run()
}
