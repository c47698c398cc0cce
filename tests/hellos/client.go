// Say hello to ADDRESS as NAME with Go's crypto/tls, in the way of FEATURE.
//
// The peer only listens, so the handshake always fails; that is no error here.
package main

import (
	"crypto/tls"
	"encoding/base64"
	"log"
	"os"
)

func main() {
	address, name, feature, echConfigs := os.Args[1], os.Args[2], os.Args[3], os.Args[4]
	config := &tls.Config{ServerName: name}
	switch feature {
	case "tls13":
	case "tls12":
		config.MaxVersion = tls.VersionTLS12
	case "h2":
		config.NextProtos = []string{"h2", "http/1.1"}
	case "ech":
		configs, err := base64.StdEncoding.DecodeString(echConfigs)
		if err != nil {
			log.Fatal(err)
		}
		config.EncryptedClientHelloConfigList = configs
	default:
		log.Fatalf("unknown feature %q", feature)
	}
	_, err := tls.Dial("tcp", address, config)
	log.Print(err)
}
