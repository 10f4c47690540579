// Program livenessprobe answers kubelet's HTTP probe by asking the CSI driver, in place of the sidecar of that name, whose
// module the Go proxy does not serve: the same flags as far as our manifests use them.
package main

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func main() {
	csiAddress := flag.String("csi-address", "/run/csi/socket", "socket of the driver")
	port := flag.String("health-port", "9808", "port of every address, where there is no endpoint")
	endpoint := flag.String("http-endpoint", "", "where to listen, HOST:PORT")
	timeout := flag.Duration("probe-timeout", time.Second, "for the driver to answer")
	flag.Int("v", 0, "accepted")
	flag.Parse()
	if *endpoint == "" {
		*endpoint = "0.0.0.0:" + *port
	}
	if err := serve(*csiAddress, *endpoint, *timeout); err != nil {
		fmt.Fprintln(os.Stderr, "livenessprobe:", err)
		os.Exit(1)
	}
}

func serve(csiAddress, endpoint string, timeout time.Duration) error {
	connection, err := grpc.NewClient("unix://"+csiAddress, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	identity := csi.NewIdentityClient(connection)
	http.HandleFunc("/healthz", func(answer http.ResponseWriter, request *http.Request) {
		ctx, cancel := context.WithTimeout(request.Context(), timeout)
		defer cancel()
		reply, err := identity.Probe(ctx, &csi.ProbeRequest{})
		switch {
		case err != nil:
			http.Error(answer, err.Error(), http.StatusInternalServerError)
		case reply.Ready != nil && !reply.Ready.Value:
			http.Error(answer, "the driver is not ready", http.StatusInternalServerError)
		default:
			fmt.Fprint(answer, "ok")
		}
	})
	return http.ListenAndServe(endpoint, nil)
}
